"""The decoder of a variational autoencoder, as latent diffusion has it, in plain PyTorch."""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.zoo.model import BlockModel, Recipe

LATENT_CHANNELS = 4


class ResidualBlock(nn.Module):
    """Two convolutions, each behind a group norm, and a shortcut where the width changes."""

    def __init__(self, width_in: int, width: int, groups: int) -> None:
        super().__init__()
        self.first_norm = nn.GroupNorm(groups, width_in, eps=1e-6)
        self.first = nn.Conv2d(width_in, width, 3, padding=1)
        self.second_norm = nn.GroupNorm(groups, width, eps=1e-6)
        self.second = nn.Conv2d(width, width, 3, padding=1)
        self.shortcut = nn.Conv2d(width_in, width, 1) if width_in != width else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(F.silu(self.first_norm(x)))
        h = self.second(F.silu(self.second_norm(h)))
        result: Tensor = self.shortcut(x) + h
        return result


class PixelAttention(nn.Module):
    """Attention of one head among all pixels."""

    def __init__(self, width: int, groups: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(groups, width, eps=1e-6)
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        rows = self.norm(x).flatten(2).transpose(1, 2)
        q, k, v = (f(rows).unsqueeze(1) for f in (self.query, self.key, self.value))
        mixed = self.out(F.scaled_dot_product_attention(q, k, v).squeeze(1))
        return x + torch.reshape(mixed.transpose(1, 2), x.shape)


class Stage(nn.Sequential):
    """Blocks of one width and, but for the last stage, an image of twice the side."""

    def __init__(self, width_in: int, width: int, depth: int, groups: int, grows: bool) -> None:
        blocks = (ResidualBlock(width if i else width_in, width, groups) for i in range(depth))
        super().__init__(*blocks)
        if grows:
            self.append(nn.Upsample(scale_factor=2.0, mode="nearest"))
            self.append(nn.Conv2d(width, width, 3, padding=1))


def decode_by_tiles(decode: Callable[[Tensor], Tensor], latents: Tensor, side: int) -> Tensor:
    """Images of squares that overlap by a quarter, each decoded alone, blended where they do.

    Norms and attention see one square each, so the numbers are not those of the whole image.

    Source: the way of `enable_tiling` of diffusers' `AutoencoderKL`.

    Args:
        decode: `(batch, channels, side, side)` to images.
        latents: `(batch, channels, height, width)`.
        side: of a square.
    """
    overlap = side // 4
    rows = []
    above: list[Tensor] = []
    height, width = (max(1, n - overlap) for n in latents.shape[2:])
    for top in range(0, height, side - overlap):
        row: list[Tensor] = []
        for left in range(0, width, side - overlap):
            tile = decode(latents[:, :, top : top + side, left : left + side])
            scale = tile.shape[3] // min(side, latents.shape[3] - left)
            if above:
                tile = _blended(above[len(row)], tile, overlap * scale, 2)
            row.append(_blended(row[-1], tile, overlap * scale, 3) if row else tile)
        rows.append(_joined(row, overlap * scale, 3))
        above = row
    return _joined(rows, overlap * scale, 2)


def _blended(before: Tensor, tile: Tensor, extent: int, dim: int) -> Tensor:
    """A tile whose first rows go over from the last ones of another tile to its own."""
    shape = [1] * tile.dim()
    shape[dim] = extent
    share = (torch.arange(extent, device=tile.device, dtype=tile.dtype) / extent).reshape(shape)
    end = before.narrow(dim, before.shape[dim] - extent, extent)
    own = tile.narrow(dim, 0, extent)
    rest = tile.narrow(dim, extent, tile.shape[dim] - extent)
    return torch.cat([torch.lerp(end, own, share), rest], dim)


def _joined(tiles: Sequence[Tensor], extent: int, dim: int) -> Tensor:
    """Tiles side by side, of each but the last what the next one does not have too."""
    whole = [tile.narrow(dim, 0, tile.shape[dim] - extent) for tile in tiles[:-1]]
    return torch.cat([*whole, tiles[-1]], dim)


class LatentDecoder(BlockModel):
    """Latents to images: widths `(128, 256, 512, 512)` with 32 groups are Stable Diffusion's.

    Source: the shape is that of `AutoencoderKL` of diffusers; Rombach et al., arXiv:2112.10752.

    Attributes:
        tile: side of the squares of latents that are decoded alone; None for all at once.
    """

    tile: int | None = None

    def __init__(self, widths: Sequence[int], depth: int, groups: int) -> None:
        super().__init__()
        inner = widths[-1]
        self.enter = nn.Conv2d(LATENT_CHANNELS, inner, 3, padding=1)
        self.middle = nn.Sequential(
            ResidualBlock(inner, inner, groups),
            PixelAttention(inner, groups),
            ResidualBlock(inner, inner, groups),
        )
        outs = [*reversed(widths)]
        ins = [inner, *outs[:-1]]
        self.stages = nn.ModuleList(
            Stage(a, b, depth, groups, grows=i + 1 < len(widths))
            for i, (a, b) in enumerate(zip(ins, outs, strict=True))
        )
        self.norm = nn.GroupNorm(groups, widths[0], eps=1e-6)
        self.leave = nn.Conv2d(widths[0], 3, 3, padding=1)

    def decode(self, latents: Tensor) -> Tensor:
        """Images."""
        x = self.run_block(self.middle, self.enter(latents))
        for stage in self.stages:
            x = self.run_block(stage, x)
        images: Tensor = self.leave(F.silu(self.norm(x)))
        return images

    def forward(self, latents: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        if self.tile is None:
            images = self.decode(latents)
        else:
            images = decode_by_tiles(self.decode, latents, self.tile)
        return F.mse_loss(images, targets), images


def latent_decoder(
    widths: Sequence[int], depth: int, groups: int, *, batch: int, side: int
) -> Recipe:
    """The decoder, on latents of ``side`` pixels."""
    scale = 2 ** (len(widths) - 1)

    def inputs(seed: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        shapes = {
            "latents": (batch, LATENT_CHANNELS, side, side),
            "targets": (batch, 3, scale * side, scale * side),
        }
        return {n: torch.randn(shape, generator=generator) for n, shape in shapes.items()}

    return Recipe(lambda: LatentDecoder(widths, depth, groups), inputs)
