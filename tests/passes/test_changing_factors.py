"""Factors that are Python numbers and change from call to call, which Dynamo makes symbolic."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from memopt.record import GraphRecord
from memopt.remarks import RemarkKind
from tests import references
from tests.passes.compiling import assert_close, compiled, converted, run
from tests.passes.one_head import Inputs, capped, flat, log_probs

Function = Callable[[Inputs, float], Any]


def distilled(i: Inputs, t: float) -> Tensor:
    teacher = F.linear(i.x.detach() + 1, i.w.detach())
    student = F.log_softmax(F.linear(i.x, i.w) / t, -1)
    return F.kl_div(student, F.softmax(teacher / t, -1), reduction="sum") * t**2


def both(z: Tensor) -> Tensor:
    labels = torch.arange(len(z))
    return F.cross_entropy(z, labels) + F.cross_entropy(z.T, labels)


FOUND: dict[str, Function] = {
    "divided by": lambda i, t: F.cross_entropy(flat(F.linear(i.x, i.w) / t), i.y.view(-1)),
    "times": lambda i, t: F.cross_entropy(flat(t * F.linear(i.x, i.w)), i.y.view(-1)),
    "inverse": lambda i, t: F.cross_entropy(flat(F.linear(i.x, i.w) * (1 / t)), i.y.view(-1)),
    "in place": lambda i, t: F.cross_entropy(flat(F.linear(i.x, i.w).div_(t)), i.y.view(-1)),
    "log-probabilities": lambda i, t: (
        log_probs(F.linear(i.x, i.w, i.b) * 1.0, i.known) * i.mask / t
    ).sum(),
    "temperature of both": distilled,
    "contrastive": lambda i, t: both(i.w @ i.w.detach().roll(1, 0).T / t),
    "contrastive, times": lambda i, t: both(t * (i.w @ i.w.detach().roll(1, 0).T)),
    "contrastive, with a tensor": lambda i, t: both(
        (i.w * i.temperature) @ i.w.detach().roll(1, 0).T / t
    ),
}


def at(function: Callable[..., Any], t: float) -> Callable[[Inputs], Any]:
    """The function at one temperature."""
    return lambda i: function(i, t)


def follow(function: Function) -> list[GraphRecord]:
    """Calls with three temperatures, each with eager's numbers; what is said of the graphs."""
    own, records = compiled(function, dynamic=None)
    for t in (1.5, 2.5, 0.75):
        inputs = Inputs()
        actual, expected = (run(at(f, t), inputs) for f in (own, function))
        torch.testing.assert_close(actual[0], expected[0], rtol=1e-12, atol=1e-12)
        assert_close(actual, expected)
    return records


@pytest.mark.parametrize("form", FOUND)
def test_a_changing_factor_is_followed_and_does_not_compile_again(form: str) -> None:
    records = follow(FOUND[form])
    assert len(records) == 2  # the second for all numbers
    for record in records:
        assert record.rewrites["chunk_losses"] > 0
        own = [r for r in record.remarks if r.pass_name == "chunk_losses"]
        assert {r.kind for r in own} == {RemarkKind.APPLIED}, own


def test_a_changing_softcap_is_not_followed_and_a_remark_says_so() -> None:
    records = follow(
        lambda i, t: F.cross_entropy(flat(capped(F.linear(i.x, i.w), t)), i.y.view(-1))
    )
    missed = [r for r in records[-1].remarks if r.kind is RemarkKind.MISSED]
    assert any("also read by mul" in r.text and r.source for r in missed)


def test_a_changing_label_smoothing_is_not_followed_and_a_remark_says_so() -> None:
    records = follow(
        lambda i, t: F.cross_entropy(
            flat(F.linear(i.x, i.w)), i.y.view(-1), label_smoothing=t / 10
        )
    )
    texts = [r.text for r in records[-1].remarks if r.kind is RemarkKind.MISSED and r.source]
    assert any("label smoothing changes from call to call" in text for text in texts)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("form", ["divided by", "temperature of both", "contrastive"])
def test_low_precision_is_as_near_to_float64_as_eager_is(form: str, dtype: torch.dtype) -> None:
    function, t = FOUND[form], 2.3
    own, _ = compiled(function, dynamic=None)
    own(Inputs(dtype), 1.5)

    def draw() -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        inputs = Inputs(dtype)
        exact = run(at(function, t), converted(inputs, torch.float64))
        actual, expected = (run(at(f, t), inputs) for f in (own, function))
        assert [g.dtype for g in actual] == [g.dtype for g in expected]
        return actual, exact, expected

    references.assert_draws_within_reference_error(draw)
