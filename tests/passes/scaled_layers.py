"""Layers with a norm or a scale behind them: spellings that are rewritten, and others."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
Build = Callable[[], nn.Module]


def with_statistics(model: nn.Module) -> Any:
    """In float64 and with norms in eval mode, of which one channel has a scale of 0."""
    model.double()
    for module in model.modules():
        if isinstance(module, NORMS):
            assert module.running_mean is not None
            assert module.running_var is not None
            nn.init.normal_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.5, 2)
            if module.affine:
                nn.init.normal_(module.weight)
                nn.init.normal_(module.bias)
                with torch.no_grad():
                    module.weight[0] = 0
            module.eval()
    return model


def stack(*layers: nn.Module) -> Build:
    return lambda: nn.Sequential(*layers)


class Functional(nn.Module):
    """A convolution called by keywords, and a norm as detectors write it."""

    running_mean: Tensor
    running_var: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(5, 3, 3, 3))
        self.offset = nn.Parameter(torch.randn(5))
        self.weight, self.bias = (nn.Parameter(torch.randn(5)) for _ in range(2))
        self.register_buffer("running_mean", torch.randn(5))
        self.register_buffer("running_var", torch.rand(5) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        y = F.conv2d(weight=self.kernel, padding=1, input=x, stride=2, bias=self.offset)
        weight, bias, mean, variance = (
            v.reshape(1, -1, 1, 1)
            for v in (self.weight, self.bias, self.running_mean, self.running_var)
        )
        scale = weight * (variance + 1e-5).rsqrt()
        return y * scale + (bias - mean * scale)


class Scaled(nn.Module):
    """A layer scale behind a linear layer, as vision transformers have it."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer, self.scale = layer, nn.Parameter(torch.randn(6))

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = x + self.layer(x) * self.scale
        return result


class Turned(nn.Module):
    """A linear layer whose features a norm takes for channels."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.norm = nn.Linear(4, 6), nn.BatchNorm1d(6)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.norm(self.linear(x).transpose(1, 2)).relu()
        return result


class Twice(nn.Module):
    """One convolution and one norm, for two inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution, self.norm = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(2):
            x = self.norm(self.convolution(x)).relu()
        return x


class Checkpointed(nn.Module):
    """A block that is run again by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 4, 3)
        self.body = nn.Sequential(nn.Conv2d(4, 5, 3), nn.BatchNorm2d(5), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = checkpoint(self.body, self.first(x), use_reentrant=False)
        return result


class MovingBias(nn.Module):
    """A convolution's bias that has changed by the time the norm runs, and the backward."""

    bias: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.convolution, self.norm = nn.Conv2d(3, 5, 3, bias=False), nn.BatchNorm2d(5)
        self.register_buffer("bias", torch.randn(5))

    def forward(self, x: Tensor) -> Tensor:
        y = F.conv2d(x, self.convolution.weight, self.bias)
        self.bias.add_(1)
        result: Tensor = self.norm(y).relu()
        return result


IMAGE = (2, 3, 9, 8)
REWRITTEN: dict[str, tuple[Build, tuple[int, ...], int]] = {
    "a line": (stack(nn.Conv1d(3, 5, 3), nn.BatchNorm1d(5), nn.ReLU()), (2, 3, 11), 1),
    "images": (
        stack(
            nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.ReLU(),
            nn.Conv2d(5, 4, 3, 2, 1, bias=False), nn.BatchNorm2d(4), nn.SiLU(),
        ),
        IMAGE, 2,
    ),
    "a volume": (stack(nn.Conv3d(2, 4, 2), nn.BatchNorm3d(4), nn.Tanh()), (2, 2, 4, 5, 3), 1),
    "groups": (stack(nn.Conv2d(4, 6, 3, groups=2), nn.BatchNorm2d(6)), (2, 4, 6, 6), 1),
    "each channel": (stack(nn.Conv2d(3, 6, 3, groups=3), nn.BatchNorm2d(6)), IMAGE, 1),
    "one channel": (stack(nn.Conv2d(3, 1, 3), nn.BatchNorm2d(1)), IMAGE, 1),
    "transposed": (
        stack(nn.ConvTranspose2d(3, 5, 3, 2, output_padding=1), nn.BatchNorm2d(5)), IMAGE, 1,
    ),
    "transposed in groups": (
        stack(nn.ConvTranspose2d(4, 6, 3, groups=2), nn.BatchNorm2d(6)), (2, 4, 5, 5), 1,
    ),
    "transposed, each channel": (
        stack(nn.ConvTranspose1d(4, 4, 3, groups=4), nn.BatchNorm1d(4)), (2, 4, 7), 1,
    ),
    "features": (stack(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU()), (7, 4), 1),
    "features, turned": (Turned, (2, 5, 4), 1),
    "by keywords": (Functional, IMAGE, 1),
    "a layer scale": (lambda: Scaled(nn.Linear(6, 6)), (2, 5, 6), 1),
    "a layer scale, no bias": (lambda: Scaled(nn.Linear(6, 6, bias=False)), (7, 6), 1),
    "twice": (Twice, IMAGE, 2),
    "a checkpoint": (Checkpointed, IMAGE, 1),
    "another use": (lambda: Beside((5, 1, 1), lambda y: y), IMAGE, 1),
    "steps in between": (lambda: Between(steps), IMAGE, 1),
    "a bias that moves": (MovingBias, IMAGE, 1),
}  # fmt: skip


class Shared(nn.Module):
    """One convolution's result, under two norms."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(3, 5, 3)
        self.one, self.two = nn.BatchNorm2d(5), nn.BatchNorm2d(5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.convolution(x)
        result: Tensor = self.one(y).relu() * self.two(y)
        return result


class Beside(nn.Module):
    """A layer's gradient that is right for one use of its result, and a number for another use."""

    def __init__(self, shape: tuple[int, ...], other: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(3, 5, 3, padding=1)
        self.scale, self.other = nn.Parameter(torch.randn(shape)), other

    def forward(self, x: Tensor) -> Tensor:
        y = self.convolution(x)
        result: Tensor = y * 3 + self.other(y.detach()) * self.scale
        return result


class Between(nn.Module):
    """Something between a convolution and its norm."""

    def __init__(self, between: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.convolution, self.norm, self.between = nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), between

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.norm(self.between(self.convolution(x))).relu()
        return result


def steps(y: Tensor) -> Tensor:
    """Every kind of step by channel."""
    channel = torch.arange(1, 6, dtype=y.dtype).view(-1, 1, 1)
    return channel - 0.5 * (-y / channel - 2 * channel).add(channel)


def without_affine() -> nn.Module:
    norm = nn.BatchNorm2d(5)
    norm.requires_grad_(False)
    return nn.Sequential(nn.Conv2d(3, 5, 3), norm, nn.ReLU())


def frozen_layer() -> nn.Module:
    frozen = nn.Conv2d(5, 4, 3).requires_grad_(False)
    return nn.Sequential(nn.Conv2d(3, 5, 3), nn.ReLU(), frozen, nn.BatchNorm2d(4), nn.ReLU())


class InTraining(nn.BatchNorm2d):
    """A norm that no one can put in eval mode."""

    def train(self, mode: bool = True) -> "InTraining":
        super().train(True)
        return self


class Added(nn.Module):
    """A product that is added to another for each row, under one operator."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.scale = nn.Parameter(torch.randn(6, 6)), nn.Parameter(torch.randn(6))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(x, x, self.weight) * self.scale


LEFT_ALONE: dict[str, tuple[Build, tuple[int, ...]]] = {
    "statistics of the batch": (stack(nn.Conv2d(3, 5, 3), InTraining(5), nn.ReLU()), IMAGE),
    "no affine": (stack(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5, affine=False), nn.ReLU()), IMAGE),
    "a frozen affine": (without_affine, IMAGE),
    "a frozen layer": (frozen_layer, IMAGE),
    "positions for channels": (stack(nn.Linear(4, 6), nn.BatchNorm1d(5), nn.ReLU()), (2, 5, 4)),
    "as many positions": (stack(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU()), (2, 6, 4)),
    "rows for channels": (
        stack(nn.Conv2d(3, 5, 3, padding=1), nn.BatchNorm1d(5), nn.ReLU()), (3, 5, 7),
    ),
    "two norms": (Shared, IMAGE),
    "a transpose": (
        lambda: Beside((5, 1, 1), lambda y: y.transpose(2, 3)), (2, 3, 6, 6),
    ),
    "a scale for each image": (lambda: Beside((2, 5, 1, 1), lambda y: y), (2, 3, 6, 6)),
    "what differs within a channel": (
        lambda: Between(lambda y: y * torch.linspace(-1, 1, y.shape[-1], dtype=y.dtype)), IMAGE,
    ),
    "another sum in each row": (Added, (6, 6)),
    "a large weight": (stack(nn.Linear(40, 6), nn.BatchNorm1d(6)), (9, 40)),
}  # fmt: skip
