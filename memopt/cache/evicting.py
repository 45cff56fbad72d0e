"""A cache that keeps, of a prompt, the tokens that its end looks at, and frees the others.

What the last queries of a prompt attend to is much of what the answer will. So when a prompt has
been read, its last queries give every other token a score, for each head of keys the tokens of
highest score are kept, and the rest is freed. Neighbours of a token that matters are kept with
it, as scores are those of the best token nearby. What comes after goes into a ring of the newest
tokens; the next prompt gives scores to all that is held and to its own tokens.

Sources: scores by the last queries, and the best of some neighbours: SnapKV, Li et al. (2024),
arXiv:2404.14469; more room for lower layers: PyramidKV, Cai et al. (2024), arXiv:2406.02069.

Legend: as in `memopt.cache.rows`; ``K`` tokens that are kept, ``R`` places of the ring.
"""

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from memopt.cache.layer import HeadCache, HeadLayer
from memopt.cache.rows import attended, causal, row_blocks
from memopt.cache.shape import Shape, checked_length
from memopt.cache.spans import WindowStore
from memopt.cache.store import Step, Store
from memopt.errors import ConfigError

NEAR = 7
"""Tokens of which each gets the best score; SnapKV's."""


class KeptStore(Store):
    """``K`` tokens that were chosen, and a ring of the ``R`` newest: `(B, H, K + R, D)`.

    Args:
        kept: ``K``.
        ring: ``R``.
        observed: queries at the end of a prompt that give scores; their own tokens go to the
            ring.
    """

    BATCHED: ClassVar[tuple[str, ...]] = ("keys", "values", "is_held")
    SHARED: ClassVar[tuple[str, ...]] = ("entered", "lost")

    def __init__(self, kept: int, ring: int, observed: int) -> None:
        self.kept, self.ring, self.observed = kept, ring, observed
        self.room = kept + ring

    def allocate(self, k: Tensor, v: Tensor) -> None:
        self.keys, self.values = (x.new_zeros(*x.shape[:2], self.room, x.shape[3]) for x in (k, v))
        self.is_held = k.new_zeros(len(k), self.room, dtype=torch.bool)
        self.entered = k.new_zeros((), dtype=torch.int64)
        self.lost = k.new_zeros((), dtype=torch.float32)

    def bytes_for(self, batch: int, heads: int, widths: tuple[int, int], itemsize: int) -> int:
        return batch * self.room * (heads * sum(widths) * itemsize + 1) + 8 + 4

    def attend(self, step: Step, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        if q.shape[3] > 1:
            return self._attend_many(step, q, k, v, scale)
        slot = (self.kept + self.entered % self.ring).view(1)
        self.keys.index_copy_(2, slot, k)
        self.values.index_copy_(2, slot, v)
        real = torch.ones_like(self.is_held[:, :1]) if step.real is None else step.real
        self.is_held.index_copy_(1, slot, real)
        self.entered.add_(1)
        itself = torch.arange(self.room, device=slot.device) == slot
        visible = (self.is_held | itself)[:, None, None]
        return attended(q, self.keys, self.values, visible, scale)

    def _attend_many(self, step: Step, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        n = k.shape[2]
        there = k.new_ones(len(k), n, dtype=torch.bool) if step.real is None else step.real
        if step.first != 0:
            k, v = torch.cat([self.keys, k], 2), torch.cat([self.values, v], 2)
            there = torch.cat([self.is_held, there], 1)
        if step.first == 0 and step.real is None:
            result = causal(q, k, v, scale)
        else:
            blocks = [
                attended(q[:, :, :, rows], k, v, _visible(there, n, rows)[:, None], scale)
                for rows in row_blocks(n)
            ]
            result = torch.cat(blocks, 3)
        self._keep(q, k, v, there, scale)
        return result

    def _keep(self, q: Tensor, k: Tensor, v: Tensor, there: Tensor, scale: float) -> None:
        """Choose, and free the rest, whose tensors are the caller's."""
        n, all_tokens = q.shape[3], k.shape[2]
        newest = min(self.observed, self.ring, n)
        rows = slice(n - newest, n)
        mass = observed_attention(q[:, :, :, rows], k, _visible(there, n, rows), scale)
        older = all_tokens - newest
        chosen = _best(mass[..., :older], there[:, None, :older])[..., : self.kept]
        self.is_held.zero_()
        for held, new in ((self.keys, k), (self.values, v)):
            index = chosen[..., None].expand(-1, -1, -1, held.shape[3])
            held[:, :, : chosen.shape[2]] = new.gather(2, index)
            held[:, :, self.kept : self.kept + newest] = new[:, :, older:]
        count = there[:, :older].sum(1, keepdim=True)
        self.is_held[:, : chosen.shape[2]] = torch.arange(chosen.shape[2], device=k.device) < count
        self.is_held[:, self.kept : self.kept + newest] = there[:, older:]
        self.entered.fill_(newest)
        stays = mass.gather(2, chosen).sum(2) + mass[..., older:].sum(2)
        self.lost.copy_(1 - (stays / mass.sum(2).clamp(min=1e-30)).mean())


def _best(mass: Tensor, there: Tensor) -> Tensor:
    """Tokens in the order in which they are kept: `(B, H, N)`.

    First by the best of their neighbours, and where they share it by their own attention, so that
    the order does not depend on the device; those that are not there come last.
    """
    if not mass.shape[2]:
        return mass.new_empty(mass.shape, dtype=torch.int64)
    near = F.max_pool1d(mass, NEAR, 1, NEAR // 2).masked_fill(~there, -1.0)
    by_own = mass.argsort(dim=-1, descending=True, stable=True)
    by_near = near.gather(2, by_own).argsort(dim=-1, descending=True, stable=True)
    return by_own.gather(2, by_near)


def _visible(there: Tensor, n: int, rows: slice) -> Tensor:
    """What some of the ``n`` newest tokens see of all: `(B, rows, tokens)`; each sees itself."""
    tokens = torch.arange(there.shape[1], device=there.device)
    own = torch.arange(there.shape[1] - n, there.shape[1], device=there.device)[rows, None]
    return (tokens <= own) & there[:, None] | (tokens == own)


def observed_attention(q: Tensor, k: Tensor, visible: Tensor, scale: float) -> Tensor:
    """Attention that each token gets from some queries, a head of keys at a time: `(B, H, N)`.

    Args:
        q: `(B, H, G, rows, D)`.
        k: `(B, H, N, D)`.
        visible: `(B, rows, N)`.
        scale: of the scores.
    """
    hidden = ~visible[:, None]
    masses = []
    for head in range(k.shape[1]):
        scaled = q[:, head].flatten(1, 2) * scale  # before the product, which may not fit in fp16
        scores = (scaled @ k[:, head].transpose(1, 2)).view(len(q), *q.shape[2:4], -1)
        shares = scores.masked_fill_(hidden, -torch.inf).softmax(-1, dtype=torch.float32)
        masses.append(shares.sum((1, 2)))
    return torch.stack(masses, 1)


def pyramid(mean: int, layers: int, steepness: float = 20.0) -> list[int]:
    """Tokens for each layer, in even steps from many in the first to few in the last.

    Args:
        mean: tokens of a layer, on average.
        layers: how many.
        steepness: the last layer gets the mean over this, as PyramidKV's ``beta``; 1 gives all
            layers the same.

    Raises:
        ConfigError: for a mean or layers below 1, or a steepness below 1.
    """
    if mean < 1 or layers < 1 or steepness < 1:
        raise ConfigError(
            f"pyramid({mean}, {layers}, {steepness}): a mean, layers and a steepness from 1 on"
        )
    least = mean / steepness
    if layers == 1:
        return [mean]
    step = 2 * (mean - least) / (layers - 1)
    exact = [2 * mean - least - step * layer for layer in range(layers)]
    ends = [round(sum(exact[: layer + 1])) for layer in range(layers)]  # so that none is lost
    return [end - start for start, end in zip([0, *ends], ends, strict=False)]


class EvictingCache(HeadCache):
    """A cache that keeps some tokens of a prompt for every head, and frees the others.

    Pays: after a long prompt the bytes of `K + R` tokens are left of each head's `N`. Does not:
    where later questions ask for what the first did not look at. It is lossy: `lost_attention`
    says how much of what the prompt's end attended to is gone. Tokens that were generated leave
    when ``ring`` newer ones are there, so give it as many as an answer has.

    Args:
        config: the model's.
        kept: ``K``: one number, which layers share as a `pyramid`; one for each layer; or for
            each layer one for each of its heads of keys, from a profile.
        max_length: tokens of the prompts and all that is generated, at most.
        ring: ``R``, newest tokens that are held besides.
        observed: queries at the end of a prompt that give scores; at most ``ring``.

    Raises:
        ConfigError: the numbers do not fit the model, or it has no such cache.
    """

    def __init__(
        self,
        config: Any,
        kept: int | Sequence[int] | Sequence[Sequence[int]],
        max_length: int,
        ring: int = 512,
        observed: int = 32,
    ) -> None:
        shape, length = Shape.of(config), checked_length(max_length)
        if not 1 <= observed <= ring:
            raise ConfigError(
                f"observed={observed!r}, ring={ring!r}: 1 or more, and no more than ring"
            )
        super().__init__(
            [
                HeadLayer(_groups(counts, window, length, ring, observed), length)
                for counts, window in zip(_by_head(kept, shape), shape.windows, strict=True)
            ]
        )

    def lost_attention(self) -> list[float]:
        """For each layer, the share of the last prompt's observed attention that is gone."""
        return [_lost(layer) for layer in self.layers]


def _by_head(kept: Any, shape: Shape) -> list[list[int]]:
    layers = len(shape.windows)
    if isinstance(kept, int):
        kept = pyramid(kept, layers)
    by_head = [[n] * shape.heads if isinstance(n, int) else list(n) for n in kept]
    if [len(counts) for counts in by_head] != [shape.heads] * layers:
        raise ConfigError(
            f"kept for {[len(counts) for counts in by_head]} heads: this model has {layers} "
            f"layers of {shape.heads} heads of keys"
        )
    if any(not isinstance(n, int) or n < 0 for counts in by_head for n in counts):
        raise ConfigError(f"kept={kept!r}: numbers of tokens from 0 on")
    return by_head


def _groups(
    counts: list[int], window: int | None, length: int, ring: int, observed: int
) -> list[tuple[list[int], Store]]:
    """Heads that keep the same number together; a layer with a window of its own holds that."""
    if window is not None and window < length:
        return [(list(range(len(counts))), WindowStore(window, 0))]
    return [
        ([head for head, n in enumerate(counts) if n == wanted], KeptStore(wanted, ring, observed))
        for wanted in dict.fromkeys(counts)
    ]


def _lost(layer: HeadLayer) -> float:
    shares = [
        float(store.lost) * len(heads)
        for heads, store in zip(layer.heads, layer.stores, strict=True)
        if isinstance(store, KeptStore) and layer.is_initialized
    ]
    return sum(shares) / len(layer.order)
