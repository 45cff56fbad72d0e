"""One training step of a model and its gradients, for tests that compare two ways to take it."""

from typing import Any

import torch
from torch import Tensor, nn

from bench.zoo import step


def train_step(run: Any, model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    """The loss of one step; the gradients stay in the model.

    Every step starts without gradients and from the same random state, and holds what the model
    returned until the backward has ended.

    Args:
        run: ``model``, compiled or not.
        model: whose gradients are dropped first.
        inputs: keyword arguments.
    """
    model.zero_grad(set_to_none=True)
    torch.manual_seed(3)
    return step(run, inputs)


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """Copies of the gradients that parameters have, by name."""
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
