"""One number added to all similarities, as open_clip's ``logit_bias``: no softmax sees it."""

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from memopt.remarks import RemarkKind
from tests import references
from tests.passes.compiling import assert_close, run_compiled
from tests.passes.test_contrastive_losses import autocast, both

PAIRS, SIZE = 300, 8


class Batch(NamedTuple):
    """Embeddings of both sides, the scale and the bias."""

    x: Tensor
    y: Tensor
    scale: Tensor
    bias: Tensor

    @classmethod
    def draw(cls, dtype: torch.dtype = torch.float64, *, seed: int = 0) -> "Batch":
        torch.manual_seed(seed)
        x, y = (torch.randn(PAIRS, SIZE, dtype=dtype) for _ in range(2))
        scale, bias = torch.tensor(1.7, dtype=dtype), torch.tensor(-10.0, dtype=dtype)
        return cls(*(t.requires_grad_() for t in (x, y, scale, bias)))

    def gradients(self, value: Tensor) -> list[Tensor | None]:
        return list(torch.autograd.grad(value, list(self), allow_unused=True))


Function = Callable[[Any], Any]


def open_clip(i: Any) -> Tensor:
    """As ``ClipLoss.get_logits`` writes it."""
    x = i.scale * i.x @ i.y.T
    y = i.scale * i.y @ i.x.T
    x += i.bias
    y += i.bias
    return both(x, y)


def transposed(i: Any) -> Tensor:
    return both(i.scale * (i.x @ i.y.T) + i.bias)


FORMS: dict[str, Function] = {
    "in place": open_clip,
    "out of place": lambda i: both(i.scale * i.x @ i.y.T + i.bias, i.scale * i.y @ i.x.T + i.bias),
    "transposed": transposed,
    "before the scale": lambda i: both((i.x @ i.y.T + i.bias) * i.scale),
    "bias first": lambda i: both(i.bias + i.scale * (i.x @ i.y.T)),
    "one dimension": lambda i: both(i.scale * (i.x @ i.y.T) + i.bias.view(1)),
    "frozen": lambda i: both(i.scale * (i.x @ i.y.T) + i.bias.detach()) + 0 * i.bias,
    "in one direction": lambda i: both(i.scale * i.x @ i.y.T + i.bias, i.scale * i.y @ i.x.T),
}


@pytest.mark.parametrize("form", FORMS)
def test_a_bias_is_left_out_and_has_eagers_gradient(form: str) -> None:
    batch, function = Batch.draw(), FORMS[form]
    expected = function(batch)
    wanted = batch.gradients(expected)
    actual, (record,) = run_compiled(function, batch)
    remarks = [r for r in record.remarks if r.pass_name == "chunk_losses"]
    assert {r.kind for r in remarks} == {RemarkKind.APPLIED}, remarks
    assert record.rewrites["chunk_losses"] == 1
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)
    assert_close(batch.gradients(actual), wanted)


def test_a_loss_in_one_direction_takes_the_bias_as_one_per_class() -> None:
    def function(i: Any) -> Tensor:
        z: Tensor = i.scale * i.x @ i.y.T + i.bias
        loss = F.cross_entropy(z, torch.arange(PAIRS))
        return loss + torch.logsumexp(z, -1).square().mean()

    batch = Batch.draw()
    expected = function(batch)
    wanted = batch.gradients(expected)
    actual, (record,) = run_compiled(function, batch)
    assert record.rewrites["chunk_losses"] == 1
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)
    assert_close(batch.gradients(actual), wanted)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "autocast"])
def test_low_precision_is_as_near_to_float64_as_eager_is(dtype: str) -> None:
    seeds = iter(range(5))
    own: Function = transposed if dtype != "autocast" else autocast(transposed)

    def draw() -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        low = torch.bfloat16 if dtype == "bfloat16" else torch.float32
        batch = Batch.draw(low, seed=next(seeds))
        exact = Batch(*(t.detach().double().requires_grad_() for t in batch))
        value, (record,) = run_compiled(own, batch)
        assert record.rewrites["chunk_losses"] == 1
        results = (value, batch), (transposed(exact), exact), (own(batch), batch)
        a, b, c = ([v.detach(), *torch.autograd.grad(v, list(i))] for v, i in results)
        assert [t.dtype for t in a] == [t.dtype for t in c]
        return a, b, c

    references.assert_draws_within_reference_error(draw)


def read_beside(i: Any) -> Tensor:
    z = i.x @ i.y.T
    mean = z.view(-1)
    z += i.bias
    loss: Tensor = both(z) + mean.mean()
    return loss


def one_bias_per_column(i: Any) -> Tensor:
    return both(i.x @ i.y.T + i.x[:, 0])


@pytest.mark.parametrize("function", [read_beside, one_bias_per_column])
def test_what_is_more_than_a_shift_stays(function: Function) -> None:
    batch = Batch.draw()
    expected = function(batch)
    wanted = batch.gradients(expected)
    actual, (record,) = run_compiled(function, batch)
    assert not any("both directions" in r.text for r in record.remarks)
    missed = [r for r in record.remarks if r.kind is RemarkKind.MISSED]
    assert [bool(r.source) for r in missed] == [True], missed
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)
    assert_close(batch.gradients(actual), wanted)


def test_similarities_that_are_returned_with_a_bias_stay_whole_and_a_remark_says_so() -> None:
    def function(i: Any) -> tuple[Tensor, Tensor]:
        z = i.scale * (i.x @ i.y.T) + i.bias
        return both(z), z

    batch = Batch.draw()
    expected, z = function(batch)
    (actual, similarities), (record,) = run_compiled(function, batch)
    assert any("returns similarities with something added" in r.text for r in record.remarks)
    torch.testing.assert_close((actual, similarities), (expected, z), rtol=1e-12, atol=1e-12)
    assert_close(batch.gradients(actual), batch.gradients(expected))
