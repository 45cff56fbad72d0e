"""What the chunked-loss pass leaves alone, with the reason and eager's numbers."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.passes.compiling import assert_as_eager, assert_declined
from tests.passes.one_head import CLASSES, Function, Inputs, flat


def overwritten(i: Inputs) -> Tensor:
    hidden = i.x * 1.0
    logits = F.linear(hidden, i.w.detach())
    hidden.add_(1.0)
    return F.cross_entropy(flat(logits), i.y.view(-1)) + hidden.sum()


def through_a_view(i: Inputs) -> Tensor:
    logits = F.linear(i.x, i.w)
    logits.view(-1, CLASSES).mul_(2.0)
    return F.cross_entropy(flat(logits), i.y.view(-1))


def per_sample(i: Inputs) -> Tensor:
    def loss(x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(F.linear(x, i.w), y)

    return torch.vmap(loss)(i.x, i.known).sum()


def flat_few(i: Inputs) -> Tensor:
    return F.linear(i.x, i.w[:9]).reshape(-1, 9)


DECLINED: dict[str, tuple[Function, str]] = {
    "a temperature behind a detach": (
        lambda i: F.cross_entropy(flat(F.linear(i.x, i.w).detach() / i.temperature), i.y.view(-1)),
        "also read by cross_entropy",
    ),
    "a bias with a dimension more": (
        lambda i: F.cross_entropy(
            (flat(F.linear(i.x, i.w)) + i.buffer.view(1, 1, -1))[0], i.y.view(-1)
        ),
        "also read by",
    ),
    "accuracy in the graph": (
        lambda i: (
            F.cross_entropy(flat(z := F.linear(i.x, i.w)), i.y.view(-1))
            + (z.argmax(-1) == i.y).double().mean()
        ),
        "also read by argmax",
    ),
    "hidden state overwritten": (overwritten, "overwrites an input of the head"),
    "logits overwritten through a view": (through_a_view, "also read by"),
    "inside vmap": (per_sample, "inside a functorch transform"),
    "few classes": (
        lambda i: F.cross_entropy(flat_few(i), i.known.view(-1) % 9),
        "too few to pay",
    ),
    "trained targets": (
        lambda i: F.cross_entropy(flat(F.linear(i.x, i.w)), flat(i.x @ i.w.T).softmax(-1)),
        "also read by",
    ),
    "sum of two linear layers": (
        lambda i: F.cross_entropy(flat(F.linear(i.x, i.w) + F.linear(i.x, i.w)), i.y.view(-1)),
        "also read by",
    ),
    "negative factor": (
        lambda i: F.cross_entropy(flat(F.linear(i.x, i.w) * -1.0), i.y.view(-1)),
        "also read by",
    ),
    "the memory read as another dtype": (
        lambda i: (
            F.cross_entropy(
                flat(F.linear(i.x, i.w).detach().view(torch.int64).view(torch.float64)),
                i.y.view(-1),
            )
            + i.x.sum()
        ),
        "also read by view",
    ),
    "loss of negated log-probabilities": (
        lambda i: F.cross_entropy(-flat(F.linear(i.x, i.w)).log_softmax(-1), i.y.view(-1)),
        "also read by",
    ),
    "sum of the log-probabilities behind a softcap": (
        lambda i: (
            F.cross_entropy(flat(z := F.linear(i.x, i.w)), i.y.view(-1))
            + z.tanh().log_softmax(-1).sum(-1).mean()
        ),
        "also read by",
    ),
    "quantised to eight bits": (
        lambda i: F.cross_entropy(
            flat(F.linear(i.x, i.w).to(torch.float8_e4m3fn).to(torch.float64)), i.y.view(-1)
        ),
        "also read by",
    ),
    "one loss is the bias of another": (
        lambda i: F.cross_entropy(
            (z := F.linear(i.w, i.w)) + torch.logsumexp(z, -1), torch.arange(CLASSES) % 7
        ),
        "one loss on the logits is an input of another",
    ),
    "factor per class": (
        lambda i: F.cross_entropy(flat(F.linear(i.x, i.w) * i.weight), i.y.view(-1)),
        "also read by",
    ),
}


@pytest.mark.parametrize("form", DECLINED)
def test_what_cannot_be_served_is_left_alone_with_the_reason(form: str) -> None:
    function, reason = DECLINED[form]
    assert_declined(assert_as_eager(function, Inputs()), reason)
