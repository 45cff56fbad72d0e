"""Lazy logits where autograd does not see what happens: unseen writes, and ways round."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from memopt.errors import StaleLogitsError
from memopt.lazy.logits import LazyLogits

CLASSES, HIDDEN = 307, 16


def fused_step(weight: nn.Parameter) -> None:
    weight.grad = torch.ones_like(weight)
    torch.optim.AdamW([weight], lr=1e-3, fused=True).step()


WRITES: dict[str, Callable[[nn.Parameter], object]] = {
    "a fused optimizer": fused_step,
    "data": lambda weight: weight.data.add_(1.0),
    "numpy": lambda weight: weight.detach().numpy().fill(1.0),
}


@pytest.mark.parametrize("write", WRITES)
def test_writes_that_autograd_does_not_count_make_the_logits_stale(write: str) -> None:
    weight = nn.Parameter(torch.randn(CLASSES, HIDDEN))
    logits = LazyLogits(torch.randn(3, 5, HIDDEN), weight)
    WRITES[write](weight)
    with pytest.raises(StaleLogitsError, match="the head's weight was changed in place"):
        logits.sum()


@pytest.mark.parametrize("shape", [(HIDDEN,), (0, 5, HIDDEN), (5, 3, HIDDEN), (2, 3, 5, HIDDEN)])
def test_numbers_that_are_no_numbers_are_no_change(shape: tuple[int, ...]) -> None:
    hidden = torch.randn(5, 3, 2, 4, 5 * HIDDEN)[..., ::5].flatten()[: torch.Size(shape).numel()]
    hidden = (hidden * torch.nan).view(shape)
    assert LazyLogits(hidden, torch.randn(CLASSES, HIDDEN)).isnan().all()


def retained(z: Tensor) -> Tensor:
    z.retain_grad()
    return z * 2


USES: dict[str, Callable[[Tensor], Tensor]] = {
    "vmap": lambda z: torch.vmap(lambda rows: rows.logsumexp(-1))(z),
    "retained": retained,
}


@pytest.mark.parametrize("use", USES)
def test_a_hidden_state_that_depends_on_the_weight_gets_its_gradient_once(use: str) -> None:
    """As where the weight is an embedding's too."""
    weight = nn.Parameter(torch.randn(CLASSES, HIDDEN, dtype=torch.float64))
    hidden = torch.tanh(weight[:15].view(3, 5, HIDDEN))
    (expected,) = torch.autograd.grad(
        USES[use](hidden @ weight.T).square().sum(), weight, retain_graph=True
    )
    (actual,) = torch.autograd.grad(USES[use](LazyLogits(hidden, weight)).square().sum(), weight)
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-12)
