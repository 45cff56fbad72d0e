"""Blocks that are compiled one by one share a graph, and with ``repeats`` a budget."""

from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.meter import Meter
from memopt._torch import BackendCompilerFailed
from memopt.planner.problem import Problem
from memopt.planner.search import Search
from tests.graphs import lowered, problem_of

WIDTH, ROWS, BLOCKS = 8, 4096, 6


class Block(nn.Module):
    """Activations that are much larger than its weights, and several fates for them."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = x + self.down(F.gelu(self.up(self.norm(x))))
        return y


def trained(options: Mapping[str, Any] | None) -> tuple[int, list[Tensor]]:
    """The peak of a step of blocks that are compiled one by one, and its gradients."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = nn.Sequential(*(Block() for _ in range(BLOCKS))).double()
    x = torch.randn(ROWS, WIDTH, dtype=torch.float64, requires_grad=True)
    if options is not None:
        for block in model:
            block.compile(backend="memopt", options={"lowering": "eager", **options})
    model(x).sum().backward()
    for tensor in (x, *model.parameters()):
        tensor.grad = None
    with Meter() as meter:
        model(x).sum().backward()
    return meter.peak_bytes, [t.grad for t in (x, *model.parameters()) if t.grad is not None]


@pytest.fixture(scope="module")
def kept() -> tuple[int, list[Tensor]]:
    """A step that keeps everything."""
    return trained({"memory_budget": 1.0})


def problem(repeats: int) -> Problem:
    block, x = Block().double(), torch.randn(ROWS, WIDTH, dtype=torch.float64, requires_grad=True)
    return problem_of(block, x, repeats=repeats)


@pytest.mark.parametrize("share", [0.75, 0.5])
def test_a_budget_in_bytes_bounds_the_step_of_all_blocks(
    kept: tuple[int, list[Tensor]], share: float
) -> None:
    budget = int(share * kept[0])
    peak, gradients = trained({"memory_budget": budget, "repeats": BLOCKS})
    assert peak <= budget
    for own, expected in zip(gradients, kept[1], strict=True):
        torch.testing.assert_close(own, expected, rtol=1e-9, atol=1e-9)
    with pytest.warns(UserWarning, match=r"set the option repeats \(now 1\)") as warned:
        alone, _ = trained({"memory_budget": budget})
    assert len(warned) == 1
    assert alone > budget, "each block takes the whole budget for itself"


def test_the_model_is_exact_for_a_step_of_repeats(kept: tuple[int, list[Tensor]]) -> None:
    """But for the last result, which no one holds here, and numbers as small as a loss."""
    block, x = Block().double(), torch.randn(ROWS, WIDTH, dtype=torch.float64, requires_grad=True)
    captured = lowered(block, memory_budget=1.0, repeats=BLOCKS)
    captured(x)
    predicted = captured.outcome.chosen.peak_bytes
    assert abs(predicted - ROWS * WIDTH * 8 - kept[0]) <= 4096


def test_one_repeat_is_the_graph_itself() -> None:
    one = problem(1).keep_everything()
    assert one.peak_bytes == one.liveness.peak_bytes


def test_every_repeat_holds_what_it_saved_and_returned() -> None:
    peaks = [problem(repeats).keep_everything() for repeats in (1, 2, 3)]
    held = {c.liveness.saved_bytes + c.liveness.output_bytes for c in peaks}
    steps = {after.peak_bytes - before.peak_bytes for before, after in pairwise(peaks)}
    assert steps == held
    assert len(held) == 1


def test_a_forward_alone_leaves_nothing_for_others() -> None:
    block = Block().requires_grad_(False)
    compiled = torch.compile(
        block,
        backend="memopt",
        options={"lowering": "eager", "memory_budget": 3 * ROWS * 8 * WIDTH * 4, "repeats": 99},
    )
    assert compiled(torch.randn(ROWS, WIDTH)).shape == (ROWS, WIDTH)


def test_the_lowest_peak_is_that_of_all_repeats() -> None:
    """Of one block alone, a value that is held through its peak is for free."""
    many = problem(BLOCKS)
    alone = problem(1)
    lowest = Search(many, solver="exact").floor
    of_one = many.evaluate(Search(alone, solver="exact").floor.saved, "lowest of one")
    assert lowest.peak_bytes <= of_one.peak_bytes
    assert lowest.liveness.saved_bytes < many.keep_everything().liveness.saved_bytes


def test_a_budget_that_all_repeats_break_names_them() -> None:
    with pytest.raises(BackendCompilerFailed, match=f"for {BLOCKS} repeats of the graph"):
        trained({"memory_budget": 2 * ROWS * WIDTH * 8, "repeats": BLOCKS})
