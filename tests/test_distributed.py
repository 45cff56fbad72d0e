"""DDP, FSDP2 and tensor parallelism on gloo ranks: what eager computes, whatever each plans."""

from collections.abc import Iterator, Mapping

import pytest
import torch

from tests.distributed_models import Layout, train
from tests.ranks import Ranks, ranks

Budget = float | str | None
# Pieces of rows are not what is tested here, and searched for at length.
OPTIONS = {"lowering": "eager", "strict": True, "passes": {"cut_rows": False}}
LAYOUTS: Mapping[str, tuple[Layout, Budget]] = {
    "ddp": (Layout("ddp", ragged=True), "min"),
    "fsdp, all at once": (Layout("fsdp", ragged=True), "min"),
    "fsdp, block by block": (Layout("fsdp", blocks=True, ragged=True), "min"),
    "tp": (Layout("tp"), "min"),
    "tp of rows and classes": (Layout("tp", rows=True, classes=True), "min"),
}


@pytest.fixture(scope="module")
def two() -> Iterator[Ranks]:
    with ranks(2) as started:
        yield started


def assert_trains_as_eager(layout: Layout, by_rank: Mapping[int, Budget]) -> None:
    """Losses and gradients of memopt are eager's.

    Args:
        layout: how the model is distributed.
        by_rank: the budget of each rank.
    """
    budget = by_rank[torch.distributed.get_rank()]
    expected, gradients = train(layout, None)
    torch._dynamo.reset()
    losses, own = train(layout, OPTIONS | {"memory_budget": budget})
    torch.testing.assert_close(losses, expected, rtol=1e-11, atol=0)
    torch.testing.assert_close(own, gradients, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(("layout", "budget"), LAYOUTS.values(), ids=LAYOUTS.keys())
def test_ranks_with_budgets_of_their_own_train_as_eager_does(
    two: Ranks, layout: Layout, budget: Budget
) -> None:
    two.run(assert_trains_as_eager, layout, {0: budget, 1: None})


@pytest.mark.slow
@pytest.mark.parametrize("classes", [False, True])
def test_a_square_of_ranks_trains_as_eager_does(classes: bool) -> None:
    layout = Layout("fsdp+tp", rows=True, classes=classes, ragged=True)
    with ranks(4) as four:
        four.run(assert_trains_as_eager, layout, dict.fromkeys(range(4), "min"))
