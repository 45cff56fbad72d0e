"""A plan is data: written, read, refused where it does not fit, and replayed."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import memopt
from memopt.errors import PlanError
from memopt.plan import Plan, fingerprint
from tests.graphs import lowered

PLAN = Plan(
    fingerprint="0123456789abcdef",
    saved=("mm", "tanh_1"),
    peak_bytes=4096,
    seconds=0.25,
    budget_bytes=8192,
    solver="exact",
)


def body(**changes: object) -> str:
    return json.dumps({**json.loads(PLAN.to_json()), **changes})


@given(
    st.builds(
        Plan,
        fingerprint=st.text("0123456789abcdef", min_size=16, max_size=16),
        saved=st.lists(st.text(min_size=1), unique=True).map(lambda names: tuple(sorted(names))),
        peak_bytes=st.integers(0, 2**60),
        seconds=st.integers(0, 10**12).map(lambda nanoseconds: nanoseconds / 1e9),
        budget_bytes=st.none() | st.integers(1, 2**60),
        solver=st.text(),
    )
)
def test_a_plan_survives_json(plan: Plan) -> None:
    assert Plan.from_json(plan.to_json()) == plan


def test_equal_plans_give_equal_text_whatever_the_order_of_names() -> None:
    turned = dataclasses.replace(PLAN, saved=PLAN.saved[::-1])
    assert turned.to_json() == PLAN.to_json()


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "not JSON"),
        ("{", "not JSON"),
        ("[]", "list"),
        ("{}", "schema is None"),
        (body(schema=99), "schema is 99"),
        (json.dumps({"schema": 2}), "fingerprint"),
        (body(peak_bytes="much"), "much"),
        (body(saved=None), "malformed"),
        (body(saved="tanh"), "malformed"),
        (body(saved=[1, 2]), "malformed"),
    ],
)
def test_what_is_no_plan_is_refused_with_the_reason(text: str, reason: str) -> None:
    with pytest.raises(PlanError, match=reason):
        Plan.from_json(text)


def test_a_fingerprint_depends_on_every_line_and_their_order() -> None:
    assert fingerprint(["a", "b"]) == fingerprint(["a", "b"])
    assert len({fingerprint(x) for x in (["a", "b"], ["b", "a"], ["a"], ["ab"])}) == 4


def function(x: torch.Tensor) -> torch.Tensor:
    for _ in range(4):
        x = (x @ x).tanh()
    return x.sum()


def square() -> torch.Tensor:
    return torch.randn(8, 8, requires_grad=True)


def planned(path: Path) -> Plan:
    """A plan made at the lowest budget, written to ``path``."""
    captured = lowered(function, memory_budget="min")
    captured(square())
    path.write_text(captured.outcome.plan.to_json())
    return captured.outcome.plan


def inner(error: BaseException) -> Any:
    """What the backend raised."""
    return getattr(error, "inner_exception", error)


def test_replaying_a_plan_gives_its_saved_set_and_its_peak(tmp_path: Path) -> None:
    plan = planned(tmp_path / "plan.json")
    free = lowered(function)
    free(square())
    assert free.outcome.plan.saved != plan.saved
    replayed = lowered(function, plan=str(tmp_path / "plan.json"))
    replayed(square())
    assert replayed.outcome.plan.saved == plan.saved
    assert replayed.outcome.plan.peak_bytes == plan.peak_bytes


def test_the_plan_in_a_report_is_the_one_that_is_replayed(tmp_path: Path) -> None:
    options = {"lowering": "eager", "memory_budget": "min"}
    (graph,) = memopt.explain(function, square(), options=options).graphs
    assert graph.plan is not None
    (tmp_path / "plan.json").write_text(graph.plan.to_json())
    replayed = lowered(function, plan=str(tmp_path / "plan.json"))
    replayed(square())
    assert replayed.outcome.plan.saved == graph.plan.saved


def test_a_plan_for_another_graph_is_refused(tmp_path: Path) -> None:
    planned(tmp_path / "plan.json")
    with pytest.raises(Exception, match="plan again") as caught:
        lowered(function, plan=str(tmp_path / "plan.json"))(torch.randn(9, 9, requires_grad=True))
    assert isinstance(inner(caught.value), PlanError)


def test_a_plan_that_names_what_the_graph_does_not_have_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    plan = planned(path)
    path.write_text(dataclasses.replace(plan, saved=(*plan.saved, "no_such_node")).to_json())
    with pytest.raises(Exception, match="no_such_node") as caught:
        lowered(function, plan=str(path))(square())
    assert isinstance(inner(caught.value), PlanError)


def test_a_plan_file_that_is_not_there_is_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "nowhere.json"
    with pytest.raises(Exception, match=r"nowhere\.json") as caught:
        lowered(function, plan=str(path))(square())
    assert isinstance(inner(caught.value), PlanError)


def test_an_edited_plan_stays_correct(tmp_path: Path) -> None:
    def drops(x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.dropout(x @ x, 0.5, training=True).tanh().sum()

    captured = lowered(drops, memory_budget="min")
    captured(square())
    path = tmp_path / "plan.json"
    path.write_text(dataclasses.replace(captured.outcome.plan, saved=()).to_json())
    x = square()
    torch.manual_seed(3)
    expected = torch.autograd.grad(drops(x), x)
    torch.manual_seed(3)
    actual = torch.autograd.grad(lowered(drops, plan=str(path))(x), x)
    torch.testing.assert_close(actual, expected)
