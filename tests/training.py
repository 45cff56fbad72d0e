"""One training step of a model and its gradients, for tests that compare two ways to take it."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from bench.zoo import step
from tests.references import assert_within_reference_error


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


def assert_trains_within_reference_error(
    actual: tuple[Any, nn.Module],
    float64: tuple[Any, nn.Module],
    low_precision: tuple[Any, nn.Module],
    draws: Iterable[dict[str, Tensor]],
) -> None:
    """The gradient, over several inputs at once, is within the reference's error.

    All parameters' together, as one vector, within that error itself. A single parameter's, which
    may be a number or two, within three times it, as in torch's own check of compiled models
    (``torch._dynamo.utils.same``).

    Args:
        actual: what is trained, compiled, and the module that its gradients are left in.
        float64: the truth, in the same form; floating-point inputs are converted for it.
        low_precision: what decides how far off the gradients may be, in the same form.
        draws: keyword arguments of each step.
    """
    sides: list[list[dict[str, Tensor]]] = [[], [], []]
    for inputs in draws:
        wide = {n: v.double() if v.is_floating_point() else v for n, v in inputs.items()}
        for side, (run, model), own in zip(
            sides, (actual, float64, low_precision), (inputs, wide, inputs), strict=True
        ):
            start = {name: value.clone() for name, value in model.state_dict().items()}
            train_step(run, model, own)
            side.append(gradients(model))
            model.load_state_dict(start)
    names = list(sides[1][0])
    assert names, "nothing is trained"
    assert all(step.keys() == set(names) for side in sides for step in side)
    whole = [[torch.cat([step[n].flatten() for step in side for n in names])] for side in sides]
    assert_within_reference_error(*whole)
    for name in names:
        single = [[torch.stack([step[name] for step in side])] for side in sides]
        assert_within_reference_error(*single, times=3.0)
