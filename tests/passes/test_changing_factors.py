"""Factors that are Python numbers and change from call to call, which Dynamo makes symbolic."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx

from memopt.backend import compile_graph, read_options
from memopt.record import GraphRecord
from memopt.remarks import RemarkKind
from tests import references
from tests.passes.compiling import assert_close, options
from tests.passes.one_head import Inputs, capped, flat, gradients, log_probs

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


def run(function: Function) -> list[GraphRecord]:
    """Calls with three temperatures, each with eager's numbers; what is said of the graphs."""
    torch._dynamo.reset()
    config, records = read_options(options()), list[GraphRecord]()

    def backend(gm: fx.GraphModule, example: Any) -> Any:
        return compile_graph(gm, example, config, records.append)

    compiled: Any = torch.compile(function, backend=backend)
    for t in (1.5, 2.5, 0.75):
        inputs = Inputs()
        expected = function(inputs, t)
        wanted = gradients(expected, inputs)
        actual = compiled(inputs, t)
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)
        assert_close(gradients(actual, inputs), wanted)
    return records


@pytest.mark.parametrize("form", FOUND)
def test_a_changing_factor_is_followed_and_does_not_compile_again(form: str) -> None:
    records = run(FOUND[form])
    assert len(records) == 2  # the second for all numbers
    for record in records:
        assert record.rewrites["chunk_losses"] > 0
        own = [r for r in record.remarks if r.pass_name == "chunk_losses"]
        assert {r.kind for r in own} == {RemarkKind.APPLIED}, own


def test_a_changing_softcap_is_not_followed_and_a_remark_says_so() -> None:
    records = run(lambda i, t: F.cross_entropy(flat(capped(F.linear(i.x, i.w), t)), i.y.view(-1)))
    missed = [r for r in records[-1].remarks if r.kind is RemarkKind.MISSED]
    assert any("also read by mul" in r.text and r.source for r in missed)


def test_a_changing_label_smoothing_is_not_followed_and_a_remark_says_so() -> None:
    records = run(
        lambda i, t: F.cross_entropy(
            flat(F.linear(i.x, i.w)), i.y.view(-1), label_smoothing=t / 10
        )
    )
    texts = [r.text for r in records[-1].remarks if r.kind is RemarkKind.MISSED and r.source]
    assert any("label smoothing changes from call to call" in text for text in texts)


def rounded(dtype: torch.dtype, seed: int) -> tuple[Inputs, Inputs]:
    """The same numbers in low precision and in double."""
    low, exact = Inputs(seed=seed), Inputs(seed=seed)
    for name, tensor in vars(low).items():
        if tensor.is_floating_point():
            own = tensor.detach().to(dtype)
            setattr(low, name, own.requires_grad_(tensor.requires_grad))
            double = own.detach().double().requires_grad_(tensor.requires_grad)
            setattr(exact, name, double)
    return low, exact


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("form", ["divided by", "temperature of both", "contrastive"])
def test_low_precision_is_as_near_to_float64_as_eager_is(form: str, dtype: torch.dtype) -> None:
    function, seeds = FOUND[form], iter(range(5))
    torch._dynamo.reset()
    compiled: Any = torch.compile(function, backend="memopt", options=options())
    compiled(rounded(dtype, 0)[0], 1.5)

    def draw() -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        low, exact = rounded(dtype, next(seeds))
        t = 2.3
        results = ((compiled(low, t), low), (function(exact, t), exact), (function(low, t), low))
        a, b, c = (
            [v.detach(), *(g for g in gradients(v, own) if g is not None)] for v, own in results
        )
        assert [g.dtype for g in a] == [g.dtype for g in c]
        return a, b, c

    references.assert_draws_within_reference_error(draw)
