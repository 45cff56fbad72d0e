"""The Triton text of a fused region's kernel, in one of two forms.

Where a program holds whole rows, or nothing needs them whole, it goes over tiles of rows with a
fixed set of columns, and what no row changes is computed before. Where rows are too wide it goes
over each of them in blocks: a sum is kept entry by entry of a block and added up at the end of
the row, and what was computed of a block is computed again behind a sum that it needs.
"""

from collections.abc import Iterable, Mapping, Sequence

import sympy
import torch
from sympy.printing.str import StrPrinter

from memopt.rows.body import spelled
from memopt.rows.index import Size
from memopt.rows.ir import (
    Compute,
    Extent,
    Load,
    Operand,
    Position,
    Reduce,
    RowProgram,
    Spread,
    Store,
    Value,
)
from memopt.rows.tiling import has_row_sums, is_looped

STEP = "    "
_MERGED = {
    "sum": "{0} + {1}",
    "max": "tl.maximum({0}, {1}, propagate_nan=tl.PropagateNan.ALL)",
    "min": "tl.minimum({0}, {1}, propagate_nan=tl.PropagateNan.ALL)",
}


def kernel_text(program: RowProgram) -> str:
    """The jitted function ``kernel``."""
    form = _InBlocks(program) if is_looped(program) else _InTiles(program)
    form.body()
    pointers = [f"{t.name}_ptr" for t in (*program.arguments, *program.results)]
    sizes = program.size_names.values()
    parameters = [*pointers, *sizes, "rows", "ROWS: tl.constexpr", "BLOCK: tl.constexpr"]
    head = ["@triton.jit", "def kernel(", *(f"{STEP}{p}," for p in parameters), "):"]
    return "\n".join([*head, *form.lines])


class _InTiles:
    """The form for whole rows; statements are lines, indented by their depth."""

    def __init__(self, program: RowProgram) -> None:
        self.program = program
        self.width = program.space.width
        self.values = program.values
        self.dtypes = {t.name: t.dtype for t in program.results}
        self.lines: list[str] = []
        self.depth = 1

    def body(self) -> None:
        self.columns("tl.program_id(1) * ({block})")
        self.compute(v for v in self.program.body if not v.extent.rows)
        self.tiles()
        self.compute(v for v in self.program.body if v.extent.rows)
        for store in self.program.stores:
            self.store(store)

    def say(self, line: str) -> None:
        self.lines.append(STEP * self.depth + line)

    def tiles(self) -> None:
        """Begin the loop over tiles of rows."""
        self.say("for tile in range(tl.program_id(0), tl.cdiv(rows, ROWS), tl.num_programs(0)):")
        self.depth += 1
        self.say("row = tile * ROWS + tl.arange(0, ROWS)[:, None].to(tl.int64)")
        self.say("in_row = row < rows")

    def columns(self, first: str) -> None:
        """Number the columns, and the groups of them that something is counted in."""
        for group in sorted({1, *(v.extent.group for v in self.program.body)} - {0}):
            block, name = _block(group), _column(group)
            start = first.format(block=block, group=group).replace(" // 1", "")
            self.say(f"{name} = {start} + tl.arange(0, {block})[None, :]")
            self.say(f"in_{name} = {name} < {self.width // group}")

    def compute(self, values: Iterable[Value]) -> None:
        for value in values:
            if isinstance(value, Reduce):
                self.reduce(value)
            else:
                self.say(f"{value.name} = {self.expression(value)}")

    def reduce(self, value: Reduce) -> None:
        if value.of_row:
            self.finish(value, _neutralised(value), "axis=1, keep_dims=True")
        else:
            group = value.extent.group
            shape = f"({_rows(value.extent)}, {_block(group)}, {group})"
            self.finish(value, f"tl.reshape({value.source}, {shape})", "axis=2")

    def finish(self, value: Reduce, source: str, how: str) -> None:
        """Reduce; Triton leaves NaN out of extrema, so they are looked for beside."""
        name = value.name
        if value.operator == "sum":
            kind = "" if value.dtype == torch.float32 else f".to({spelled(value.dtype)})"
            self.say(f"{name} = tl.sum({source}, {how}){kind}")
            return
        if source != name:
            self.say(f"{name} = {source}")
        self.say(f"{name}_nan = tl.max(({name} != {name}).to(tl.int32), {how}) > 0")
        most = f"tl.{value.operator}({name}, {how})"
        self.say(f'{name} = tl.where({name}_nan, float("nan"), {most})')

    def expression(self, value: Value) -> str:
        if isinstance(value, Load):
            mask = _mask(value.extent)
            there = f"{value.tensor}_ptr + {self.place(value, value.extent.group)}"
            text = f"tl.load({there}{mask}{', other=0' * bool(mask)})"
            return f"{text}.to(tl.float32)" if value.dtype == torch.float32 else text
        if isinstance(value, Position):
            return f"({self.place(value, value.extent.group)}).to({spelled(value.dtype)})"
        if isinstance(value, Compute):
            return value.text.format(*map(_operand, value.operands))
        assert isinstance(value, Spread), "bug in memopt"
        rows, size = _rows(value.extent), value.source_group // value.extent.group
        shape = f"({rows}, {_block(value.source_group)}, {size})"
        wide = f"tl.broadcast_to({value.source}[:, :, None], {shape})"
        return f"tl.reshape({wide}, ({rows}, {_block(value.extent.group)}))"

    def place(self, where: Load | Position | Store, group: int) -> str:
        """Where lanes find their entries, in elements."""
        expression = where.offset.expression(self.program.space, max(1, group))
        return printed(expression, self.program.size_names)

    def store(self, store: Store) -> None:
        group, text = store.offset.group, store.source
        extent = Extent(True, group)
        if self.values[text].extent != extent:
            text = f"tl.broadcast_to({text}, (ROWS, {_block(group) if group else 1}))"
        mask = _mask(extent)
        if not group and not has_row_sums(self.program):  # programs of the same rows are several
            mask += " & (tl.program_id(1) == 0)"
        there = f"{store.tensor}_ptr + {self.place(store, group)}"
        self.say(f"tl.store({there}, {text}.to({spelled(self.dtypes[store.tensor])}){mask})")


class _InBlocks(_InTiles):
    """The form for rows in blocks: one loop over them for every sum that waits for another."""

    def body(self) -> None:
        program = self.program
        level = program.levels()
        narrow = [v for v in program.body if not v.extent.group]
        fixed = [v for v in narrow if not v.extent.rows and not level[v.name]]
        self.compute(v for v in fixed if not isinstance(v, Reduce))
        self.tiles()
        for current in range(1 + max(level.values())):
            here = [v for v in narrow if level[v.name] == current and v not in fixed]
            self.compute(v for v in here if not isinstance(v, Reduce))
            sums = [v for v in narrow if isinstance(v, Reduce) and level[v.name] == current]
            stores = [s for s in program.stores if level[s.source] == current]
            self.blocks(sums, [s for s in stores if s.offset.group])
            for store in stores:
                if not store.offset.group:
                    self.store(store)

    def blocks(self, sums: Sequence[Reduce], stores: Sequence[Store]) -> None:
        """One loop over the blocks of a row."""
        if not sums and not stores:
            return
        for value in sums:
            shape = f"({_rows(value.extent)}, BLOCK)"
            self.say(f"{value.name} = tl.full({shape}, {_neutral(value)}, {spelled(value.dtype)})")
        self.say(f"for start in range(0, {self.width}, BLOCK):")
        self.depth += 1
        self.columns("start // {group}")
        wanted = self.wide([*(v.source for v in sums), *(s.source for s in stores)])
        self.compute(v for v in self.program.body if v.name in wanted)
        for value in sums:
            total = _MERGED[value.operator].format(value.name, _neutralised(value))
            self.say(f"{value.name} = {total}")
        for store in stores:
            self.store(store)
        self.depth -= 1
        for value in sums:
            self.finish(value, value.name, "axis=1, keep_dims=True")

    def wide(self, names: Iterable[str]) -> set[str]:
        """Of the values and all that they are made of, those with entries for columns."""
        found: set[str] = set()
        pending = list(names)
        while pending:
            name = pending.pop()
            if name not in found and self.values[name].extent.group:
                found.add(name)
                pending += self.values[name].sources()
        return found


class _Printer(StrPrinter):  # type: ignore[misc]
    """Arithmetic on whole numbers as Python writes it."""

    def _print_Quotient(self, call: sympy.Expr) -> str:  # noqa: N802 - sympy finds it by name
        return "(({}) // ({}))".format(*map(self._print, call.args))

    def _print_Remainder(self, call: sympy.Expr) -> str:  # noqa: N802 - sympy finds it by name
        return "({} % ({}))".format(*map(self._print, call.args))


def printed(expression: Size, names: Mapping[sympy.Symbol, str]) -> str:
    """Whole numbers as Python writes them, sizes by their names."""
    symbols = {s: sympy.Symbol(n, integer=True, positive=True) for s, n in names.items()}
    text: str = _Printer().doprint(sympy.sympify(expression).xreplace(symbols))
    return text


def _mask(extent: Extent) -> str:
    inside = ["in_row"] * extent.rows + [f"in_{_column(extent.group)}"] * bool(extent.group)
    return f", mask={' & '.join(inside)}" if inside else ""


def _neutral(value: Reduce) -> str:
    if value.operator == "sum":
        return "0.0" if value.dtype.is_floating_point else "0"
    return 'float("-inf")' if value.operator == "max" else 'float("inf")'


def _neutralised(value: Reduce) -> str:
    """What is reduced, and beyond the last column what changes nothing."""
    return f"tl.where(in_column, {value.source}, {_neutral(value)})"


def _rows(extent: Extent) -> str:
    return "ROWS" if extent.rows else "1"


def _block(group: int) -> str:
    return "BLOCK" if group == 1 else f"BLOCK // {group}"


def _column(group: int) -> str:
    return "column" if group == 1 else f"column_{group}"


def _operand(operand: Operand) -> str:
    if isinstance(operand, str):
        return operand
    text = repr(operand)
    if text.lstrip("-") in ("inf", "nan"):
        return f'float("{text}")'
    return f"({text})" if text.startswith("-") else text
