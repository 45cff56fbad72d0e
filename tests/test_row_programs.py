"""Random programs, interpreted: no further from float64 than PyTorch in the same dtype."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx

pytest.importorskip("triton")

from bench.triton.gate import numbers, uninitialised_is_nan
from bench.triton.interpreter import install
from bench.triton.trace import SECTOR_BYTES, trace
from memopt.device import DEVICES
from memopt.kernels.region import launch
from memopt.rows.lowering import LoweredRows, lower_rows
from memopt.rows.select import choose_regions
from tests.row_functions import traced
from tests.row_programs import RowFunction, row_functions

install()


def interpreted(gm: fx.GraphModule, inputs: Sequence[Tensor], tiling: int) -> list[Tensor]:
    """The graph with every region run by its kernel."""
    regions = {r.members[-1]: lower_rows(r, DEVICES["a100"]) for r in choose_regions(gm.graph)}
    assert regions, "there is nothing to test"
    interpreter = fx.Interpreter(gm)
    values: dict[Any, Any] = dict(zip(gm.graph.find_nodes(op="placeholder"), inputs, strict=True))
    interpreter.env = values
    for node in gm.graph.nodes:
        if node.op == "call_function":
            values[node] = interpreter.run_node(node)
        if node in regions:
            values.update(run(regions[node], values, tiling))
    (output,) = gm.graph.find_nodes(op="output")
    return [values[node] for node in output.args[0]]


def run(region: LoweredRows, values: dict[Any, Any], tiling: int) -> dict[Any, Tensor]:
    """The results of one region, which does nothing out of order and moves what it must."""
    inputs = [values[node] for node in region.inputs]
    with trace() as launches, uninitialised_is_nan():
        results = launch(inputs, region.kernel, tiling % len(region.tilings))
    (done,) = launches
    assert done.conflicts == []
    rows = sum(t.numel() // t.shape[-1] for t in inputs if t.dim() > 1)
    ends = SECTOR_BYTES * (rows + len(inputs) + len(results))  # a row may begin within a sector
    assert done.dram_bytes <= int(region.ideal_bytes) + ends
    return dict(zip(region.results, results, strict=True))


def check(
    function: RowFunction, dtype: torch.dtype, rows: tuple[int, ...], width: int, tiling: int
) -> None:
    inputs = function.inputs(dtype, rows, width)
    actual = interpreted(traced(function, inputs), inputs, tiling)
    exact, plain = function(*(t.double() for t in inputs)), function(*inputs)
    smooth = [i for i, t in enumerate(actual) if t.is_floating_point()]
    assert numbers(*([r[i] for i in smooth] for r in (actual, exact, plain))) == []
    for mine, truth, theirs in zip(actual, exact, plain, strict=True):
        if not mine.is_floating_point():  # a step apart where both are nearly right
            wrong, others = ((t != truth).sum().item() for t in (mine, theirs))
            assert wrong <= others + 0.01 * mine.numel()


TILINGS = st.integers(0, 2)


@settings(max_examples=30)
@given(row_functions(), TILINGS)
def test_a_program_is_right(function: RowFunction, tiling: int) -> None:
    check(function, torch.float32, (3, 5), 48, tiling)


@settings(max_examples=15)
@given(row_functions(), TILINGS)
def test_low_precision_is_rounded_where_it_is_written(function: RowFunction, tiling: int) -> None:
    check(function, torch.bfloat16, (6, 8), 64, tiling)


@settings(max_examples=6)
@given(row_functions(most=5), TILINGS)
def test_rows_of_more_than_one_block_are_right(function: RowFunction, tiling: int) -> None:
    check(function, torch.float32, (2, 2), 40000, tiling)
