"""Frozen convolutions hold no inputs, and the gradient that passes them is the same."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import memopt
from memopt.passes.forget_inputs import ForgetInputs
from tests.references import assert_equal_in_float64


def frozen(*layers: nn.Module) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*layers).double().requires_grad_(False)


MODELS: dict[str, Any] = {
    "plain": lambda: (frozen(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 3)), (2, 3, 11, 13)),
    "strided": lambda: (
        frozen(nn.Conv2d(4, 8, 3, stride=2, padding=1, groups=2), nn.Conv2d(8, 4, 3, dilation=2)),
        (2, 4, 21, 23),
    ),
    "transposed": lambda: (
        frozen(nn.ConvTranspose2d(3, 8, 3, stride=2, output_padding=1), nn.Conv2d(8, 3, 1)),
        (2, 3, 7, 9),
    ),
    "of a line": lambda: (frozen(nn.Conv1d(3, 8, 5), nn.Conv1d(8, 3, 5)), (2, 3, 31)),
    "of a volume": lambda: (frozen(nn.Conv3d(2, 3, 3), nn.Conv3d(3, 2, 3)), (1, 2, 9, 8, 7)),
}
FORMATS = {4: [torch.contiguous_format, torch.channels_last]}


def draw(shape: tuple[int, ...], layout: torch.memory_format) -> Tensor:
    x = torch.randn(shape, dtype=torch.float64).to(memory_format=layout)
    return x.requires_grad_()


@pytest.mark.parametrize("lowering", ["eager", "inductor"])
@pytest.mark.parametrize("name", MODELS)
def test_the_gradient_of_the_input_is_eager_s(name: str, lowering: str) -> None:
    model, shape = MODELS[name]()
    for layout in FORMATS.get(len(shape), [torch.contiguous_format]):
        torch._dynamo.reset()
        options: Any = {"lowering": lowering, "strict": True}
        compiled: Any = torch.compile(model, backend="memopt", options=options)
        x = draw(shape, layout)
        y, expected = compiled(x), model(x)
        assert_equal_in_float64(
            (y, *torch.autograd.grad(y.square().sum(), x)),
            (expected, *torch.autograd.grad(expected.square().sum(), x)),
        )


def saved_bytes(model: nn.Module, x: Tensor, **passes: bool) -> int:
    torch._dynamo.reset()
    report = memopt.explain(model, x, options={"lowering": "eager", "passes": passes})
    (graph,) = report.graphs
    return int(graph.saved_bytes)


def test_a_frozen_chain_holds_nothing() -> None:
    model, shape = MODELS["plain"]()
    x = draw(shape, torch.contiguous_format)
    assert saved_bytes(model, x) == 0
    assert saved_bytes(model, x, **{ForgetInputs.name: False}) > 0


def test_a_trained_weight_still_holds_its_input() -> None:
    model, shape = MODELS["plain"]()
    model[1].requires_grad_(True)
    x = draw(shape, torch.contiguous_format)
    middle = model[0](x)
    assert saved_bytes(model, x) == middle.numel() * middle.element_size()
