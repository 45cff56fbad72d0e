"""Random programs, interpreted: no further from float64 than PyTorch in the same dtype."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from torch import Tensor

pytest.importorskip("triton")

from bench.triton.gate import uninitialised_is_nan
from bench.triton.interpreter import install
from bench.triton.trace import trace
from memopt.device import DEVICES
from memopt.kernels.region import launch
from memopt.row_lowering import LoweredRows, lower_rows
from memopt.row_select import choose_regions
from memopt.row_source import triton_source
from memopt.row_tiling import tilings
from tests.references import assert_within_reference_error
from tests.row_functions import Function, lowered, traced
from tests.row_programs import RowFunction, row_functions

install()


def interpreted(gm: torch.fx.GraphModule, inputs: Sequence[Tensor]) -> list[Tensor]:
    """The graph with every region run by its kernel, and what it did checked."""
    regions = {r.members[-1]: lower_rows(r, DEVICES["a100"]) for r in choose_regions(gm.graph)}
    assert regions, "there is nothing to test"
    values: dict[Any, Any] = dict(zip(gm.graph.find_nodes(op="placeholder"), inputs, strict=True))
    interpreter = torch.fx.Interpreter(gm)
    for node in gm.graph.nodes:
        if node.op == "output":
            return [values[n] for n in node.args[0]]
        if node.op != "placeholder":
            interpreter.env = values
            values[node] = interpreter.run_node(node)
        if node in regions:
            values.update(run(regions[node], values))
    raise AssertionError("a graph has an output")


def run(region: LoweredRows, values: dict[Any, Any]) -> dict[Any, Tensor]:
    with trace() as launches, uninitialised_is_nan():
        found = launch([values[n] for n in region.inputs], region.kernel)
    (done,) = launches
    assert done.conflicts == []
    assert done.dram_bytes <= 1.02 * int(region.ideal_bytes) + 32 * 2 * len(values)
    return dict(zip(region.results, found, strict=True))


def check(function: RowFunction, dtype: torch.dtype, rows: tuple[int, ...], width: int) -> None:
    inputs = function.inputs(dtype, rows, width)
    actual = interpreted(traced(function, inputs), inputs)
    exact = function(*(t.double() for t in inputs))
    plain = function(*inputs)
    floats = [i for i, t in enumerate(actual) if t.is_floating_point()]
    assert_within_reference_error(*([r[i] for i in floats] for r in (actual, exact, plain)))
    for mine, truth, theirs in zip(actual, exact, plain, strict=True):
        if not mine.is_floating_point():
            off = (mine.long() - truth.long()).abs().sum()
            assert off <= (theirs.long() - truth.long()).abs().sum() + _FLIPS * mine.numel()


# Of whole numbers, how many may lie on the other side of a step where both are nearly right.
_FLIPS = 0.01


@settings(max_examples=40)
@given(row_functions())
def test_a_program_is_right(function: RowFunction) -> None:
    check(function, torch.float32, (3, 5), 48)
