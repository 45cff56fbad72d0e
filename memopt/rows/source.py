"""The source of a fused region: a Python module with a Triton kernel and its launch.

The text depends on the program alone: names are those of the nodes, and sizes that vary are called
``size_0`` and so on in the order of the arguments.
"""

from collections.abc import Iterable, Sequence

from memopt.rows.body import short
from memopt.rows.index import Size
from memopt.rows.ir import RowProgram
from memopt.rows.kernel import STEP, kernel_text, printed
from memopt.rows.tiling import Tiling, is_looped

_MODULE = '''\
"""``{results} = region({arguments})``

{tensors}

{operators}
"""

import torch
import triton
import triton.language as tl
from triton.language.extra import libdevice

from memopt.kernels.region import as_traced, grid
from memopt.kernels.serving import warps

# Rows and columns that a program holds, and its threads.
TILINGS = (
{tilings}
)


{kernel}


{launch}
'''


def triton_source(
    program: RowProgram, tilings: Iterable[Tiling], operators: Sequence[str] = ()
) -> str:
    """The module, whose ``launch(inputs, tiling=0)`` gives the list of results.

    Args:
        program: the region.
        tilings: configurations, the default first.
        operators: what it stands for, for the reader.
    """
    tensors = (*program.arguments, *program.results)
    return _MODULE.format(
        results=", ".join(t.name for t in program.results),
        arguments=", ".join(t.name for t in program.arguments),
        tensors="\n".join(
            f"{t.name}: {short(t.dtype)} {_sizes(program, t.shape)}" for t in tensors
        ),
        operators="\n".join(operators),
        tilings="\n".join(f"{STEP}({t.rows}, {t.block}, {t.threads})," for t in tilings),
        kernel=kernel_text(program),
        launch="\n".join(_launch(program)),
    )


def _launch(program: RowProgram) -> list[str]:
    """The function that makes the results and starts the kernel."""
    names = [t.name for t in program.arguments]
    first = names[0]
    lines = [f"{', '.join(names)}, = inputs"]
    for symbol, name in program.size_names.items():
        tensor, dim = program.where_size_is(symbol)
        lines.append(f"{name} = {tensor}.shape[{dim}]")
    for t in program.arguments:
        lines.append(f"{t.name} = as_traced({t.name}, {_sizes(program, t.strides)})")
    for t in program.results:
        shape = _sizes(program, t.shape)
        lines.append(f"{t.name} = {first}.new_empty({shape}, dtype={t.dtype})")
    results = [t.name for t in program.results]
    passed = [*names, *results, *program.size_names.values(), "rows"]
    columns = "1" if is_looped(program) else f"triton.cdiv({program.space.width}, block)"
    lines += [
        f"rows = {printed(program.space.rows, program.size_names)}",
        "rows_each, block, threads = TILINGS[tiling]",
        f"programs = grid({first}, triton.cdiv(rows, rows_each), {columns}, threads)",
        f"with torch.cuda.device_of({first}):  # Triton launches on the current device",
        f"{STEP}kernel[programs](",
        f"{STEP * 2}{', '.join(passed)}, ROWS=rows_each, BLOCK=block,",
        f"{STEP * 2}num_warps=warps(threads), enable_fp_fusion=True,",
        f"{STEP})",
        f"return [{', '.join(results)}]",
    ]
    return ["def launch(inputs, tiling=0):", *(STEP + line for line in lines)]


def _sizes(program: RowProgram, sizes: Sequence[Size]) -> str:
    return "[" + ", ".join(printed(size, program.size_names) for size in sizes) + "]"
