"""Imports point down: a module imports only from layers below its own.

A new module goes into ``LAYERS``, as low as its imports allow. ``memopt.passes`` and
``memopt.kernels`` are one unit each, so their files may import one another.
"""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LAYERS: tuple[str, ...] = (
    "errors lazy memory planner rows",
    "_versions",
    "_torch remarks terminal units cli.findings memory.timeline rows.index",
    "progress stored lazy.stamps rows.ir",
    "budget device emit fusion graph paths plan stock attention.calls "
    "attention.influence attention.rules attention.runs cache.codes cache.rows cache.shape "
    "cache.store cli.asked "
    "cli.benching lazy.rows memory.ledger memory.meter rows.body",
    "_transformers config kernels record storages attention.layers lazy.rules rows.nodes "
    "rows.rules rows.tiling",
    "joint",
    "losses trials attention.profile attention.view cache.layer lazy.logits memory.lives "
    "memory.schedule memory.workspace planner.mincut report.page report.text rows.kernel "
    "rows.reader",
    "cost pipeline attention.plan attention.search cache.attention cache.columns memory.liveness "
    "memory.replay memory.transfers report.report rows.select rows.source",
    "cutters forms planner.held report returned attention.trials cache.spans rows.lowering",
    "attention.calibration cache.evicting cache.host cache.quantized rows.choice",
    "attention cache passes planner.problem",
    "chunking planner.regions",
    "planner.solve",
    "partition memory.certify planner.search",
    "outcome",
    "cutting",
    "splitting",
    "proofs",
    "diagnosis lowering",
    "backend",
    "bisecting explaining packaging planning cli.doctor",
    "api cli.app",
    "cli",
    "__init__ __main__",
)
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names.split()}
OUTSIDE = {"bench", "tests", "passes", "kernels"}


def sources() -> dict[str, Path]:
    """Every source file by its dotted name once installed, packages as ``memopt.x.__init__``."""
    tops = {"memopt": "memopt", "memopt.passes": "passes", "memopt.kernels": "kernels"}
    return {
        ".".join([package, *path.relative_to(ROOT / folder).with_suffix("").parts]): path
        for package, folder in tops.items()
        for path in sorted((ROOT / folder).rglob("*.py"))
    }


SOURCES = sources()


def own_unit(module: str) -> str:
    """What a module is called in ``LAYERS``: ``memopt.passes.x`` is in ``passes``."""
    name = module.removeprefix("memopt.")
    top = name.split(".")[0]
    return top if top in ("passes", "kernels") else name.removesuffix(".__init__")


UNITS = {own_unit(module) for module in SOURCES}


def unit(name: str) -> str:
    """The unit that an imported name belongs to: the longest that it starts with."""
    parts = name.split(".")[1:]
    starts = (".".join(parts[:n]) for n in range(len(parts), 0, -1))
    return next((start for start in starts if start in UNITS), "__init__")


def imports(tree: ast.AST) -> Iterator[str]:
    """The dotted name of everything imported, wherever the statement stands."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"line {node.lineno}: write the import in full"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def upward(module: str, tree: ast.AST) -> list[str]:
    """The imports of ``module`` that do not point down."""
    here = own_unit(module)
    bad = []
    for name in imports(tree):
        top = name.split(".")[0]
        if top in OUTSIDE:
            bad.append(f"{module} imports {name}, which is not part of the package")
        there = unit(name)
        known = top == "memopt" and {here, there} <= set(RANK)
        if known and here != there and RANK[there] >= RANK[here]:
            bad.append(f"{module} (layer {RANK[here]}) imports {there} (layer {RANK[there]})")
    return bad


def private_torch_names(tree: ast.AST) -> Iterator[str]:
    """Private names of torch that are imported, or reached from an imported module of torch.

    Operators are no Python names: ``torch.ops.aten._softmax`` is public.
    """
    bound: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                bound[alias.asname or alias.name.split(".")[0]] = (
                    alias.name if alias.asname else alias.name.split(".")[0]
                )
                yield from _private(alias.name)
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                bound[alias.asname or alias.name] = f"{node.module}.{alias.name}"
                yield from _private(f"{node.module}.{alias.name}")
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            yield from _private(_dotted(node, bound))


def _dotted(node: ast.expr, bound: dict[str, str]) -> str:
    if isinstance(node, ast.Attribute):
        return f"{_dotted(node.value, bound)}.{node.attr}"
    return bound.get(node.id, "") if isinstance(node, ast.Name) else ""


def _private(name: str) -> Iterator[str]:
    parts = name.split(".")
    if parts[0] == "torch" and parts[1:2] != ["ops"]:
        hidden = [part for part in parts if part.startswith("_") and not part.endswith("__")]
        yield from [name] * bool(hidden)


@pytest.mark.parametrize("module", SOURCES)
def test_every_module_has_one_layer(module: str) -> None:
    unit = own_unit(module)
    assert " ".join(LAYERS).split().count(unit) == 1, f"{unit!r} belongs into LAYERS, once"


def test_every_layer_has_modules() -> None:
    assert set(RANK) == UNITS


@pytest.mark.parametrize("module", SOURCES)
def test_imports_point_down(module: str) -> None:
    assert upward(module, ast.parse(SOURCES[module].read_text())) == []


@pytest.mark.parametrize("module", sorted(set(SOURCES) - {"memopt._torch"}))
def test_private_names_of_torch_are_imported_in_one_module_only(module: str) -> None:
    found = sorted(set(private_torch_names(ast.parse(SOURCES[module].read_text()))))
    assert found == [], "import these through memopt/_torch.py"


@pytest.mark.parametrize(
    "code",
    [
        "import memopt.backend",
        "from memopt.backend import memopt",
        "from memopt import backend",
        "from memopt import __version__",
        "def f():\n    from memopt.api import optimize",
        "if TYPE_CHECKING:\n    from memopt.api import optimize",
        "import passes",
        "from bench.cases import CASES",
    ],
)
def test_an_upward_import_is_seen(code: str) -> None:
    assert upward("memopt.config", ast.parse(code))


@pytest.mark.parametrize(
    "code",
    [
        "import torch._dynamo",
        "from torch import _dynamo",
        "from torch._ops import OpOverload",
        "from torch.fx.graph import _PyTreeCodeGen",
        "import torch\ntorch._C._something()",
        "from torch import fx\nfx._pytree.tree_map(f, x)",
        "import torch.fx as fx\nfx._compat",
    ],
)
def test_a_private_name_is_seen(code: str) -> None:
    assert list(private_torch_names(ast.parse(code)))


@pytest.mark.parametrize(
    "code",
    [
        "import torch\ntorch.__version__",
        "import torch\ntorch.ops.aten._softmax.default",
        "from memopt._torch import compile_fx",
        "import torch\nself._torch.x",
    ],
)
def test_a_public_name_is_left_alone(code: str) -> None:
    assert not list(private_torch_names(ast.parse(code)))
