"""Convolutional networks in plain PyTorch: ResNet-50, DenseNet, U-Net."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.zoo.hugging_face import image_inputs
from bench.zoo.model import BlockModel, Recipe

CLASSES = 10


class Bottleneck(nn.Module):
    """ResNet's block of three convolutions; source: He et al., arXiv:1512.03385."""

    def __init__(self, width_in: int, width: int, stride: int) -> None:
        super().__init__()
        width_out = 4 * width
        self.body = nn.Sequential(
            nn.Conv2d(width_in, width, 1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(inplace=True),
            nn.Conv2d(width, width, 3, stride, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(inplace=True),
            nn.Conv2d(width, width_out, 1, bias=False),
            nn.BatchNorm2d(width_out),
        )
        self.shortcut = nn.Sequential()
        if stride != 1 or width_in != width_out:
            self.shortcut.append(nn.Conv2d(width_in, width_out, 1, stride, bias=False))
            self.shortcut.append(nn.BatchNorm2d(width_out))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.body(x) + self.shortcut(x), inplace=True)


class ResNet(BlockModel):
    """ResNet of bottleneck blocks; depths `(3, 4, 6, 3)` at width 64 is ResNet-50."""

    def __init__(self, depths: Sequence[int], width: int) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, width, 7, 2, padding=3, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(3, 2, padding=1),
        )
        self.blocks = nn.ModuleList()
        width_in = width
        for stage, depth in enumerate(depths):
            for index in range(depth):
                stride = 2 if stage and not index else 1
                self.blocks.append(Bottleneck(width_in, width << stage, stride))
                width_in = 4 * (width << stage)
        self.head = nn.Linear(width_in, CLASSES)

    def forward(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        x = self.stem(images)
        for block in self.blocks:
            x = self.run_block(block, x)
        logits = self.head(x.mean((2, 3)))
        return F.cross_entropy(logits, labels), logits


class DenseLayer(nn.Module):
    """One layer of a dense block: what it returns is its input with ``growth`` more channels."""

    def __init__(self, width: int, growth: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.BatchNorm2d(width),
            nn.ReLU(inplace=True),
            nn.Conv2d(width, 4 * growth, 1, bias=False),
            nn.BatchNorm2d(4 * growth),
            nn.ReLU(inplace=True),
            nn.Conv2d(4 * growth, growth, 3, padding=1, bias=False),
        )

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, self.body(x)], 1)


class DenseNet(BlockModel):
    """DenseNet, whose concatenations make saved tensors grow with the square of the depth.

    Source: Huang et al., arXiv:1608.06993.
    """

    def __init__(self, depths: Sequence[int], growth: int) -> None:
        super().__init__()
        width = 2 * growth
        self.stem = nn.Conv2d(3, width, 3, padding=1, bias=False)
        self.blocks = nn.ModuleList()
        for stage, depth in enumerate(depths):
            if stage:
                self.blocks.append(self._transition(width))
                width //= 2
            for _ in range(depth):
                self.blocks.append(DenseLayer(width, growth))
                width += growth
        self.head = nn.Linear(width, CLASSES)

    @staticmethod
    def _transition(width: int) -> nn.Module:
        return nn.Sequential(
            nn.BatchNorm2d(width),
            nn.ReLU(inplace=True),
            nn.Conv2d(width, width // 2, 1, bias=False),
            nn.AvgPool2d(2),
        )

    def forward(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        x = self.stem(images)
        for block in self.blocks:
            x = self.run_block(block, x)
        logits = self.head(x.mean((2, 3)))
        return F.cross_entropy(logits, labels), logits


class ConvPair(nn.Sequential):
    """Two convolutions with group normalisation, U-Net's unit."""

    def __init__(self, width_in: int, width: int) -> None:
        super().__init__(
            nn.Conv2d(width_in, width, 3, padding=1),
            nn.GroupNorm(4, width),
            nn.SiLU(),
            nn.Conv2d(width, width, 3, padding=1),
            nn.GroupNorm(4, width),
            nn.SiLU(),
        )


class UNet(BlockModel):
    """U-Net: skip connections keep early activations alive until the end of the forward.

    Source: Ronneberger et al., arXiv:1505.04597.
    """

    def __init__(self, widths: Sequence[int]) -> None:
        super().__init__()
        ins = (3, *widths[:-1])
        self.down = nn.ModuleList(ConvPair(a, b) for a, b in zip(ins, widths, strict=True))
        pairs = list(zip(widths[1:], widths[:-1], strict=True))[::-1]
        self.lift = nn.ModuleList(nn.ConvTranspose2d(a, b, 2, 2) for a, b in pairs)
        self.up = nn.ModuleList(ConvPair(2 * b, b) for _, b in pairs)
        self.head = nn.Conv2d(widths[0], 3, 1)

    def forward(self, images: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        x, skips = images, []
        for level, block in enumerate(self.down):
            x = self.run_block(block, F.max_pool2d(x, 2) if level else x)
            skips.append(x)
        for lift, block in zip(self.lift, self.up, strict=True):
            skip = skips[-2]
            del skips[-1]
            x = self.run_block(block, torch.cat([lift(x), skip], 1))
        prediction = self.head(x)
        return F.mse_loss(prediction, targets), prediction


def resnet(depths: Sequence[int], width: int, *, frozen: bool, batch: int, side: int) -> Recipe:
    """ResNet; ``frozen`` runs batch normalisation in eval mode, as in fine-tuning."""

    def build() -> nn.Module:
        model = ResNet(depths, width)
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.train(not frozen)
        return model

    names = ("images", "labels")
    return Recipe(build, lambda seed: image_inputs(names, CLASSES, batch, side, seed))


def densenet(depths: Sequence[int], growth: int, *, batch: int, side: int) -> Recipe:
    """DenseNet on images of ``side`` pixels."""
    names = ("images", "labels")
    return Recipe(
        lambda: DenseNet(depths, growth),
        lambda seed: image_inputs(names, CLASSES, batch, side, seed),
    )


def unet(widths: Sequence[int], *, batch: int, side: int) -> Recipe:
    """U-Net that maps images to images of the same size."""

    def inputs(seed: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        shape = (batch, 3, side, side)
        return {name: torch.randn(shape, generator=generator) for name in ("images", "targets")}

    return Recipe(lambda: UNet(widths), inputs)
