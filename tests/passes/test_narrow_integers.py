"""Positions are held in as few bytes as they need: the same gradients, and fewer bytes."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from memopt.passes.narrow_integers import NarrowIntegers
from memopt.planner.problem import Candidate
from memopt.planner.search import Search
from tests.graphs import assert_same, lowered, problem_of, seeded

ON: dict[str, Any] = {NarrowIntegers.name: {"least": 8}}
Function = Callable[..., Any]


def largest(x: Tensor) -> tuple[Tensor]:
    return (x.sin().topk(3, -1).values.square().sum(),)


def smallest(x: Tensor) -> tuple[Tensor]:
    values, _ = x.sin().min(dim=-2)
    return (values.square().sum(),)


def in_order(x: Tensor) -> tuple[Tensor]:
    values, order = x.sin().sort(dim=0, stable=True)
    return ((values * x.gather(0, order)).sum(),)


def median(x: Tensor) -> tuple[Tensor]:
    return (x.sin().median(dim=1).values.square().sum(),)


def third(x: Tensor) -> tuple[Tensor]:
    return (x.sin().kthvalue(3, dim=1).values.square().sum(),)


def running(x: Tensor) -> tuple[Tensor]:
    return (x.sin().cummax(dim=1).values.square().sum(),)


def picked(x: Tensor) -> tuple[Tensor]:
    """The position in the whole tensor, and in a row."""
    y = x.sin()
    flat, rows = y.argmax(), y.argmin(1, keepdim=True)
    return (y.flatten()[flat] * y.gather(1, rows).square().sum(),)


def pooled(x: Tensor) -> tuple[Tensor]:
    images = x.sin().view(2, 4, -1, x.shape[1])
    return (F.max_pool2d(images, 3, 2, padding=1).square().sum(),)


FUNCTIONS = (largest, smallest, in_order, median, third, running, picked, pooled)


def drawn(rows: int = 64, width: int = 96) -> Tensor:
    generator = torch.Generator().manual_seed(rows)
    return torch.randn(rows, width, generator=generator, dtype=torch.float64).requires_grad_()


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("width", [96, 300])
def test_gradients_are_those_of_eager(function: Function, width: int) -> None:
    """In one byte, and in two."""
    arguments = [drawn(width=width)]
    compiled = lowered(function, memory_budget="min", passes=ON)
    assert_same(seeded(compiled, arguments), seeded(function, arguments))


@pytest.mark.parametrize("function", FUNCTIONS)
def test_what_every_operator_returns_is_offered_in_fewer_bytes(function: Function) -> None:
    joint = problem_of(function, drawn(), memory_budget=0.5, passes=ON).joint
    assert joint.encodings or function is picked
    for encoding in joint.encodings:
        (wide,), (narrow,) = (joint.storage_of[i] for i in (encoding.source, encoding.encoded))
        assert joint.storages[narrow].nbytes * 4 <= joint.storages[wide].nbytes


@pytest.mark.parametrize(
    ("entries", "dtype"),
    [(256, torch.uint8), (257, torch.int16), (2**15, torch.int16), (2**15 + 1, torch.int32)],
)
def test_the_last_entry_still_fits(entries: int, dtype: torch.dtype) -> None:
    """The largest value is the last of each row."""

    def function(x: Tensor) -> tuple[Tensor]:
        return (x.sin().max(dim=1).values.square().sum(),)

    x = torch.zeros(8, entries, dtype=torch.float64)
    x[:, -1] = 1.0
    arguments = [x.requires_grad_()]
    compiled = lowered(function, memory_budget="min", passes={NarrowIntegers.name: {"least": 1}})
    assert_same(seeded(compiled, arguments), seeded(function, arguments))
    joint = compiled.problem.joint
    (encoding,) = joint.encodings
    assert joint.nodes[encoding.encoded].meta["val"].dtype == dtype
    assert int(x.max(dim=1).indices[0]) == entries - 1


def test_a_plan_that_holds_positions_so_saves_seven_eighths_of_them() -> None:
    def function(x: Tensor) -> tuple[Tensor]:
        for _ in range(3):
            x = x.sin().sort(dim=1).values * 1.5
        return (x.sum(),)

    problem = problem_of(function, drawn(), memory_budget=0.5, passes=ON)
    kept = problem.keep_everything()
    encodings = [e for e in problem.joint.encodings if e.source in kept.saved]
    assert len(encodings) == 3
    forms = {e.source: e.encoded for e in encodings}
    narrow = problem.evaluate([forms.get(i, i) for i in kept.saved], "narrow")
    fewer = kept.liveness.saved_bytes - narrow.liveness.saved_bytes
    assert fewer == 3 * 64 * 96 * 7


def held_so(search: Search, budget_bytes: int | None) -> Candidate:
    """Every position that the backward reads, in fewer bytes, whatever it costs."""
    forms = {e.source: e.encoded for e in search.problem.joint.encodings}
    saved = [forms.get(i, i) for i in search.everything_kept.saved]
    return search.problem.evaluate(saved, "as asked")


def test_the_halves_agree_on_positions_of_several_operators(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Two of other shapes than the others, all held in the same kind of form."""

    def function(x: Tensor) -> tuple[Tensor]:
        for k in (3, 5):
            x = x.sin().sort(dim=1).values * 1.5
            x = x + x.cos().topk(k, -1).values.sum()
        return (x.sum(),)

    monkeypatch.setattr(Search, "plan", held_so)
    arguments = [drawn(width=300)]
    compiled = lowered(function, memory_budget=0.9, passes=ON)
    assert_same(seeded(compiled, arguments), seeded(function, arguments))
    saved = compiled.outcome.chosen.saved
    assert sum(e.encoded in saved for e in compiled.problem.joint.encodings) == 4


def test_a_size_that_changes_is_left_as_it_is() -> None:
    torch._dynamo.reset()
    options: Any = {"lowering": "eager", "memory_budget": "min", "strict": True, "passes": ON}
    compiled = torch.compile(largest, backend="memopt", dynamic=True, options=options)
    for width in (70, 90):
        assert_same(seeded(compiled, [drawn(width=width)]), seeded(largest, [drawn(width=width)]))
