"""Gated activations as models write them."""

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F

Tensor = torch.Tensor
SPELLED: Mapping[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "sigmoid": torch.sigmoid,
    "relu_squared": lambda x: torch.square(F.relu(x)),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
}


def spelled(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    return SPELLED[activation](gate) * up


def spelled_packed(x: Tensor, activation: str, gate_last: bool) -> Tensor:
    first, second = x.chunk(2, -1)
    return spelled(*((second, first) if gate_last else (first, second)), activation)
