"""One training step of a model and its gradients, for tests that compare two ways to take it."""

import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from bench.zoo import step
from memopt._torch import pytree
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


class _Float64(TorchFunctionMode):
    """What a model's code converts to float32 is converted to float64."""

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        func = Tensor.double if func is Tensor.float else func
        args, kwargs = pytree.tree_map_only(torch.dtype, _wide, (args, kwargs or {}))
        return func(*args, **kwargs)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float32 else dtype


def in_float64(model: nn.Module) -> Callable[..., Any]:
    """A model of float64 parameters, kept from computing in float32 in between."""

    def run(**inputs: Any) -> Any:
        torch.set_default_dtype(torch.float64)
        try:
            with _Float64():
                return model(**inputs)
        finally:
            torch.set_default_dtype(torch.float32)

    return run


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
    for own in itertools.chain(*sides):
        # Graphs hand zeros back for what nothing reads after a graph break, where eager has None.
        assert own.keys() >= set(names)
        assert not any(own[name].any() for name in own.keys() - set(names))
    whole = [[torch.cat([step[n].flatten() for step in side for n in names])] for side in sides]
    assert_within_reference_error(*whole)
    for name in names:
        single = [[torch.stack([step[name] for step in side])] for side in sides]
        assert_within_reference_error(*single, times=3.0)
