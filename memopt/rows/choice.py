"""Whether a fused region runs as a kernel of our own, and in which tiling: measured, and kept.

The ways are the region as a call of its operator, once for each tiling, and its nodes as Inductor
compiles them. The answer depends on the kernel's text, on the dtypes, and on the number of rows up
to the next power of two. Names are no part of it, so the layers of a model ask once.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx

from memopt._torch import disable_modes
from memopt.kernels.measured import seconds_of
from memopt.rows.body import short
from memopt.rows.ir import Reduce, RowProgram
from memopt.rows.kernel import kernel_text
from memopt.rows.lowering import LoweredRows
from memopt.rows.select import entries
from memopt.rows.tiling import power_of_two
from memopt.trials import random_like, seconds

Timer = Callable[[fx.GraphModule, Sequence[Tensor], torch.device], float]

PACKED = (torch.int8, torch.uint8)
_INDUCTOR = "inductor"


@dataclass(frozen=True)
class Choice:
    """How a region runs.

    Attributes:
        region: in its fastest tiling; None where Inductor's code is better.
        why: in figures.
    """

    region: LoweredRows | None
    why: str


def inductor_kernels(program: RowProgram) -> int:
    """How many Inductor makes of it: one for each number of columns that it reduces at a time."""
    return max(1, len({v.extent.group for v in program.body if isinstance(v, Reduce)}))


def may_be_faster(program: RowProgram) -> bool:
    """Whether it is worth asking: the clauses of `memopt.passes.fuse_rows`."""
    if not any(t.dtype in PACKED for t in program.results):
        return False
    in_groups = any(store.offset.group > 1 for store in program.stores)
    sums = sum(isinstance(value, Reduce) and value.of_row for value in program.body)
    return in_groups or inductor_kernels(program) > 1 or sums > 1


def choose(region: LoweredRows, timer: Timer = seconds) -> Choice:
    """The way that takes the fewest seconds or, without the memory to measure, moves fewer bytes.

    Each kernel of Inductor's reads again what another one has read or made. If there is one alone,
    it moves no more bytes than ours.

    Args:
        region: with all tensors on one device.
        timer: gives the seconds of a graph on these inputs.
    """
    device: torch.device = region.inputs[0].meta["val"].device

    @functools.cache
    def inputs() -> list[Tensor]:
        return [random_like(node.meta["val"]) for node in region.inputs]

    def timed(graph: Callable[[], fx.GraphModule]) -> float:
        return timer(graph(), inputs(), device)

    tilings = [replace(region, tiling=place) for place in range(len(region.tilings))]
    ways = {f"tiling {own.tiling}": functools.partial(timed, own.as_call) for own in tilings}
    ways[_INDUCTOR] = functools.partial(timed, region.as_nodes)
    with disable_modes(), torch.random.fork_rng([device] if device.type == "cuda" else []):
        known = seconds_of(_question(region), ways, device)
    if not known:
        count = inductor_kernels(region.program)
        why = f"by bytes, as Inductor needs {count} of them and no memory is left to time them"
        return Choice(region if count > 1 else None, why)
    best = min(tilings, key=lambda own: known[f"tiling {own.tiling}"])
    mine, theirs = known[f"tiling {best.tiling}"], known[_INDUCTOR]
    why = f"{1e6 * mine:.1f} us against Inductor's {1e6 * theirs:.1f}"
    return Choice(best if mine < theirs else None, why)


def _question(region: LoweredRows) -> tuple[Any, ...]:
    """What the answer depends on."""
    program = region.program
    dtypes = [short(t.dtype) for t in (*program.arguments, *program.results)]
    rows = max(map(entries, region.region.members)) // program.space.width
    return "rows", kernel_text(program), dtypes, power_of_two(rows), region.tilings
