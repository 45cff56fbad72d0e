"""An encoder of speech that sees some chunks of what was before, in plain PyTorch."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.zoo.model import BlockModel, Recipe

_SUBSAMPLED = 4  # frames of sound to one position


class FeedForward(nn.Module):
    """Half of a feed-forward layer, behind a norm."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = x + 0.5 * self.down(F.silu(self.up(self.norm(x))))
        return result


class ChunkAttention(nn.Module):
    """Attention to the keys that a mask shows."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        triple = self.qkv(self.norm(x)).reshape(*x.shape[:2], 3, self.heads, -1)
        q, k, v = triple.permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        result: Tensor = x + self.out(mixed.transpose(1, 2).flatten(2))
        return result


class ConvolutionModule(nn.Module):
    """A gate and a convolution of each channel alone, behind a norm."""

    def __init__(self, width: int, kernel: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.enter = nn.Conv1d(width, 2 * width, 1)
        self.depthwise = nn.Conv1d(width, width, kernel, padding=kernel // 2, groups=width)
        self.inner_norm = nn.LayerNorm(width)
        self.leave = nn.Conv1d(width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = F.glu(self.enter(self.norm(x).transpose(1, 2)), 1)
        h = F.silu(self.inner_norm(self.depthwise(h).transpose(1, 2)))
        result: Tensor = x + self.leave(h.transpose(1, 2)).transpose(1, 2)
        return result


class ConformerBlock(nn.Module):
    """A conformer's block.

    Source: Gulati et al. (2020), arXiv:2005.08100.
    """

    def __init__(self, width: int, heads: int, kernel: int) -> None:
        super().__init__()
        self.enter, self.leave = FeedForward(width), FeedForward(width)
        self.attention = ChunkAttention(width, heads)
        self.convolution = ConvolutionModule(width, kernel)
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        x = self.convolution(self.attention(self.enter(x), mask))
        result: Tensor = self.norm(self.leave(x))
        return result


class ChunkEncoder(BlockModel):
    """A conformer whose attention sees a chunk and some before it.

    Source: the mask is ChunkFormer's without chunks to come; Le et al. (2025), arXiv:2502.14673.

    Args:
        mels: channels of the sound.
        width: of the encoder.
        heads: of attention.
        depth: blocks.
        kernel: of the convolutions between positions.
        chunk: positions of a chunk.
        before: chunks that it sees besides itself.
    """

    def __init__(
        self, mels: int, width: int, heads: int, depth: int, kernel: int, chunk: int, before: int
    ) -> None:
        super().__init__()
        self.chunk, self.before = chunk, before
        self.enter = nn.Sequential(
            nn.Conv1d(mels, width, 3, 2, padding=1),
            nn.GELU(),
            nn.Conv1d(width, width, 3, 2, padding=1),
            nn.GELU(),
        )
        self.blocks = nn.ModuleList(ConformerBlock(width, heads, kernel) for _ in range(depth))

    def forward(self, sound: Tensor) -> Tensor:
        x: Tensor = self.enter(sound).transpose(1, 2)
        chunks = torch.arange(x.shape[1], device=x.device) // self.chunk
        behind = chunks[:, None] - chunks
        mask = (behind >= 0) & (behind <= self.before)
        for block in self.blocks:
            x = self.run_block(block, x, mask)
        return x


class FrameClassifier(nn.Module):
    """A class for each position of an encoder of sound, and the loss of that."""

    def __init__(self, encoder: nn.Module, width: int, classes: int) -> None:
        super().__init__()
        self.encoder, self.head = encoder, nn.Linear(width, classes)

    def forward(self, sound: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        scores = self.head(self.encoder(sound))
        return F.cross_entropy(scores.flatten(0, 1), labels.flatten()), scores


def chunk_encoder(
    mels: int,
    width: int,
    heads: int,
    depth: int,
    *,
    kernel: int = 7,
    chunk: int = 8,
    before: int = 2,
    batch: int = 1,
    positions: int,
) -> Recipe:
    """The encoder, on sound of so many positions."""

    def inputs(seed: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        shape = batch, mels, _SUBSAMPLED * positions
        return {"sound": torch.randn(shape, generator=generator)}

    return Recipe(lambda: ChunkEncoder(mels, width, heads, depth, kernel, chunk, before), inputs)


def frame_classifier(encoder: Recipe, width: int, classes: int) -> Recipe:
    """The encoder with a class for each position."""

    def inputs(seed: int) -> dict[str, Tensor]:
        sound = encoder.inputs(seed)["sound"]
        generator = torch.Generator().manual_seed(seed)
        shape = len(sound), sound.shape[2] // _SUBSAMPLED
        labels = torch.randint(classes, shape, generator=generator)
        return {"sound": sound, "labels": labels}

    return Recipe(lambda: FrameClassifier(encoder.build(), width, classes), inputs)
