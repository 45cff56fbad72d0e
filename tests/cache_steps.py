"""Layers of caches fed with drawn tokens, and attention written out with dense masks."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from memopt.cache import HeadLayer
from memopt.cache.layer import Pending

Tensor = torch.Tensor
SCALE = 0.3


@dataclass(frozen=True)
class Tokens:
    """Queries `(B, H * G, N, D)`, keys `(B, H, N, D)`, values `(B, H, N, E)`, which are real."""

    q: Tensor
    k: Tensor
    v: Tensor
    real: Tensor

    @classmethod
    def drawn(
        cls,
        n: int,
        heads: int = 2,
        group: int = 3,
        width: int = 8,
        padding: Sequence[int] = (0, 0),
        dtype: torch.dtype = torch.float64,
    ) -> "Tokens":
        """Some, of which as many come first in each sequence as padding."""
        batch = len(padding)
        real = torch.arange(n) >= torch.tensor(padding)[:, None]
        return cls(
            torch.randn(batch, heads * group, n, width, dtype=dtype),
            torch.randn(batch, heads, n, width, dtype=dtype),
            torch.randn(batch, heads, n, width + 2, dtype=dtype),
            real,
        )

    def at(self, columns: slice | list[int]) -> "Tokens":
        """Some of them."""
        q, k, v = (x[:, :, columns] for x in (self.q, self.k, self.v))
        return Tokens(q, k, v, self.real[:, columns])

    def to(self, dtype: torch.dtype) -> "Tokens":
        return Tokens(self.q.to(dtype), self.k.to(dtype), self.v.to(dtype), self.real)

    @property
    def positions(self) -> Tensor:
        """How many of a sequence's tokens lie before each."""
        return self.real.cumsum(1) - 1

    @property
    def is_query(self) -> Tensor:
        """Where results are compared: `(B, 1, N, 1)`."""
        return self.real[:, None, :, None]


def fed(layer: HeadLayer, tokens: Tokens, sizes: Sequence[int], masked: bool = True) -> Tensor:
    """The layer's attention of all tokens, which it gets so many at a time."""
    results, first = [], 0
    room = layer.max_length - tokens.real.shape[1]
    mask = torch.nn.functional.pad(tokens.real, (0, room)) if masked else None
    for size in sizes:
        at = slice(first, first + size)
        pending, _ = layer.update(tokens.k[:, :, at], tokens.v[:, :, at])
        assert isinstance(pending, Pending)
        results.append(layer.attend(tokens.q[:, :, at], pending, mask, SCALE))
        first += size
    return torch.cat(results, 2)


def dense(tokens: Tokens, visible: Tensor, k: Tensor | None = None) -> Tensor:
    """Softmax attention over expanded keys: ``visible`` is `(B, H, N, N)`.

    Rows of padding, which see nothing, give nothing.
    """
    group = tokens.q.shape[1] // tokens.k.shape[1]
    keys = (tokens.k if k is None else k).repeat_interleave(group, 1)
    values = tokens.v.repeat_interleave(group, 1)
    scores = tokens.q @ keys.transpose(2, 3) * SCALE
    hidden = ~visible.repeat_interleave(group, 1)
    return scores.masked_fill(hidden, -torch.inf).softmax(-1).nan_to_num(0.0) @ values


def causal_mask(tokens: Tokens) -> Tensor:
    """`(B, H, N, N)`: each token sees the real ones up to itself."""
    n = tokens.real.shape[1]
    mask = torch.ones(n, n, dtype=torch.bool).tril() & tokens.real[:, None, None]
    return mask.expand(-1, tokens.k.shape[1], -1, -1)


def span_mask(tokens: Tokens, spans: Sequence[int | None], sinks: int) -> Tensor:
    """The same, up to a span and the sinks, token by token."""
    visible = causal_mask(tokens).clone()
    positions = tokens.positions.tolist()
    for b, of_row in enumerate(positions):
        for h, span in enumerate(spans):
            for i, own in enumerate(of_row):
                for j, there in enumerate(of_row):
                    if span is not None and own - there >= span and there >= sinks:
                        visible[b, h, i, j] = False
    return visible
