"""One step of decoding with a static cache, as transformers has it, in plain PyTorch."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.zoo.model import Inputs, Recipe


class StaticCacheAttention(nn.Module):
    """The attention of one token: written into a cache of fixed length, which is then read.

    The cache has fewer heads than there are of queries; they are repeated, and a mask hides the
    places that are not filled yet.

    Attributes:
        keys: `(1, kv_heads, length, width)`.
        values: the same.
    """

    keys: Tensor
    values: Tensor

    def __init__(self, heads: int, kv_heads: int, length: int, width: int) -> None:
        super().__init__()
        self.groups = heads // kv_heads
        shape = (1, kv_heads, length, width)
        self.register_buffer("keys", torch.randn(shape))
        self.register_buffer("values", torch.randn(shape))

    def _repeated(self, x: Tensor) -> Tensor:
        batch, heads, length, width = x.shape
        x = x[:, :, None, :, :].expand(batch, heads, self.groups, length, width)
        return x.reshape(batch, heads * self.groups, length, width)

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, position: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The mean, and the result `(1, heads, 1, width)`."""
        self.keys.index_copy_(2, position, key)
        self.values.index_copy_(2, position, value)
        shown = torch.arange(self.keys.shape[2], device=query.device)[None, :] <= position[:, None]
        keys, values = self._repeated(self.keys), self._repeated(self.values)
        mixed = F.scaled_dot_product_attention(query, keys, values, attn_mask=shown[None, None])
        return mixed.mean(), mixed


def static_cache(heads: int, kv_heads: int, *, length: int, width: int) -> Recipe:
    """A `StaticCacheAttention`, and the token at nine tenths of its length."""

    def inputs(seed: int) -> Inputs:
        generator = torch.Generator().manual_seed(seed)
        named = {"query": heads, "key": kv_heads, "value": kv_heads}
        made = {n: torch.randn(1, h, 1, width, generator=generator) for n, h in named.items()}
        return {**made, "position": torch.tensor([length * 9 // 10])}

    return Recipe(lambda: StaticCacheAttention(heads, kv_heads, length, width), inputs)
