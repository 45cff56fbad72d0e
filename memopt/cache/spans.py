"""A cache whose heads each look back as far as they need, and hold no more.

Many heads of a language model look at the newest tokens and at the first ones only. A head with a
span holds those: a ring of its newest tokens beside the first, its sinks. Heads of a layer with
the same span share buffers.

Sources: sinks and a window are StreamingLLM's: Xiao et al. (2024), "Efficient streaming language
models with attention sinks", arXiv:2309.17453; a window for some heads and all tokens for others
is DuoAttention's: Xiao et al. (2025), arXiv:2410.10819; spans of many sizes are MoA's: Fu et al.
(2024), arXiv:2406.14909.

Legend: as in `memopt.cache.rows`; ``W`` is the span and ``S`` the number of sinks.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from memopt.cache.columns import FullStore
from memopt.cache.layer import HeadCache, HeadLayer
from memopt.cache.rows import attended, row_blocks
from memopt.cache.shape import Shape, checked_length
from memopt.cache.store import Step, Store
from memopt.errors import ConfigError

Span = int | None


class WindowStore(Store):
    """The first ``S`` tokens of a sequence, and a ring of its newest ``W``: `(B, H, S + W, D)`.

    The token at position ``p`` lies in slot ``p`` up to ``S``, and from there on in
    ``S + (p - S) % W``. Positions count tokens: padding takes no slot, so sequences of a batch
    are each at their own place in the ring, and each has its own sinks.

    Args:
        span: ``W``, the tokens that a query sees, its own included.
        sinks: ``S``, which it sees besides.
    """

    def __init__(self, span: int, sinks: int) -> None:
        self.span, self.sinks = span, sinks
        self.room = span + sinks

    def allocate(self, k: Tensor, v: Tensor) -> None:
        def room(x: Tensor) -> Tensor:
            return x.new_zeros(*x.shape[:2], self.room, x.shape[3])

        self.keys, self.values = room(k), room(v)

    def bytes_for(self, batch: int, heads: int, widths: tuple[int, int], itemsize: int) -> int:
        return batch * heads * self.room * sum(widths) * itemsize

    def attend(self, step: Step, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        if q.shape[3] == 1:
            return self._attend_one(step, q, k, v, scale)
        older = None if step.first == 0 else self._ring(step)
        self._write_many(step, k, v)
        is_late = _padding_leads(step)
        parts = []
        for rows in row_blocks(q.shape[3]):
            first = max(0, rows.start - self.span + 1) if is_late else 0
            held = [self._sinks(step, rows), self._band(step, k, v, slice(first, rows.stop), rows)]
            if older is not None and not (first and step.real is None):
                held.append((*older[:2], self._reaches(older[2], step, rows)))
            keys, values, visible = zip(*held, strict=True)
            mask = torch.cat(visible, 2)[:, None]
            parts.append(
                attended(q[:, :, :, rows], torch.cat(keys, 2), torch.cat(values, 2), mask, scale)
            )
        return torch.cat(parts, 3)

    def _attend_one(self, step: Step, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        """Write first: what the new token takes the place of is out of its sight."""
        rows = torch.arange(len(k), device=k.device)
        position = step.positions[:, 0].clamp(min=0)
        ring = self.sinks + (position - self.sinks) % self.span
        slot = torch.where(position < self.sinks, position, ring)
        for held, new in ((self.keys, k[:, :, 0]), (self.values, v[:, :, 0])):
            if step.real is not None:
                new = torch.where(step.real[:, :, None], new, held[rows, :, slot])
            held[rows, :, slot] = new
        if step.stop is not None and step.padding is None:
            filled = min(step.stop, self.room)
            return attended(q, self.keys[:, :, :filled], self.values[:, :, :filled], None, scale)
        tokens = (step.positions[:, 0] + 1).clamp(min=1)
        visible = self._slots(q) < tokens[:, None]
        return attended(q, self.keys, self.values, visible[:, None, None], scale)

    def _write_many(self, step: Step, k: Tensor, v: Tensor) -> None:
        """Each slot looks up the last token that belongs in it: no order of writing matters."""
        n, slots = k.shape[2], self._slots(k)
        tokens = (step.past + (n if step.real is None else step.real.sum(1)))[:, None]
        last = torch.where(slots < self.sinks, slots, self._newest(slots, tokens))
        is_new = (tokens > slots) & (last >= step.past[:, None])
        column = (last - step.past[:, None]).clamp(0, n - 1)
        if step.real is not None:
            column = (~step.real).int().argsort(dim=1, stable=True).gather(1, column)
        for held, new in ((self.keys, k), (self.values, v)):
            index = column[:, None, :, None].expand(-1, held.shape[1], -1, held.shape[3])
            held.copy_(torch.where(is_new[:, None, :, None], new.gather(2, index), held))

    def _newest(self, slots: Tensor, tokens: Tensor) -> Tensor:
        """The last position before ``tokens`` that lies in each slot of the ring."""
        return slots + (tokens - 1 - slots).div(self.span, rounding_mode="floor") * self.span

    def _slots(self, like: Tensor) -> Tensor:
        return torch.arange(self.room, device=like.device)

    def _ring(self, step: Step) -> tuple[Tensor, Tensor, Tensor]:
        """Keys, values and positions, -1 where there is none, of the ring as it was before."""
        slots, past = self._slots(self.keys)[self.sinks :], step.past[:, None]
        positions = torch.where(past > slots, self._newest(slots, past), -1)
        return (
            self.keys[:, :, self.sinks :].clone(),
            self.values[:, :, self.sinks :].clone(),
            positions,
        )

    def _reaches(self, positions: Tensor, step: Step, rows: slice) -> Tensor:
        """Which of older tokens the new ones see: `(B, rows, positions)`."""
        near = step.positions[:, rows, None] - positions[:, None] < self.span
        return near & (positions[:, None] >= 0)

    def _sinks(self, step: Step, rows: slice) -> tuple[Tensor, Tensor, Tensor]:
        """Sinks, the new ones among them, and which of the rows see them."""
        there = torch.arange(self.sinks, device=self.keys.device)
        visible = there <= step.positions[:, rows, None]
        return self.keys[:, :, : self.sinks], self.values[:, :, : self.sinks], visible

    def _band(
        self, step: Step, k: Tensor, v: Tensor, columns: slice, rows: slice
    ) -> tuple[Tensor, Tensor, Tensor]:
        """New tokens that are no sinks, and which of the rows see them.

        A row of padding sees itself, so that its result is a number.
        """
        own, there = step.positions[:, rows, None], step.positions[:, None, columns]
        visible = (there <= own) & (own - there < self.span) & (there >= self.sinks)
        if step.real is not None:
            itself = step.columns[rows, None] == step.columns[columns]
            visible = visible & step.real[:, None, columns] | itself & ~step.real[:, rows, None]
        return k[:, :, columns], v[:, :, columns], visible


def _padding_leads(step: Step) -> bool:
    """Whether places of new tokens are as far apart as their positions."""
    if step.real is None:
        return True
    if torch.compiler.is_compiling():
        return False
    return bool((step.real[:, 1:] >= step.real[:, :-1]).all())


class HeadSpanCache(HeadCache):
    """A cache with a span for every head.

    Pays: `(S + W) / N` of the bytes of each head with a span, and as much of its time in
    decoding. Does not: in a model that needs all of its heads' past; quality is the spans', so
    take them from a profile, and check them on held-out text. With ``None`` for every head
    nothing is lost.

    Args:
        config: the model's.
        spans: for each layer the span of each of its heads of keys: tokens that a query sees, its
            own included, or None for all.
        max_length: tokens of the prompt and all that is generated, at most.
        sinks: the first tokens of a sequence that every head sees besides its span, for all layers
            or for each; layers that have a window in the model itself have none.
        full: what makes the store of the heads without a span, such as
            ``partial(QuantizedStore, bits=4)`` or the ``store`` of a `memopt.cache.Stage`.

    Raises:
        ConfigError: the spans do not fit the model, or the model has no such cache.
    """

    def __init__(
        self,
        config: Any,
        spans: Sequence[Sequence[Span]],
        max_length: int,
        sinks: int | Sequence[int] = 4,
        full: Callable[[int], Store] = FullStore,
    ) -> None:
        shape, length = Shape.of(config), checked_length(max_length)
        by_layer = [sinks] * len(shape.windows) if isinstance(sinks, int) else list(sinks)
        _check(spans, by_layer, shape)
        super().__init__(
            [
                HeadLayer(_groups(list(layer), window, first, length, full), length)
                for layer, window, first in zip(spans, shape.windows, by_layer, strict=True)
            ]
        )


def _check(spans: Sequence[Sequence[Span]], sinks: list[int], shape: Shape) -> None:
    if [len(layer) for layer in spans] != [shape.heads] * len(shape.windows):
        raise ConfigError(
            f"spans of {[len(layer) for layer in spans]} heads: this model has "
            f"{len(shape.windows)} layers of {shape.heads} heads of keys, and each needs a span "
            "or None"
        )
    for span in (span for layer in spans for span in layer):
        if span is not None and (not isinstance(span, int) or span < 1):
            raise ConfigError(f"span={span!r}: a number of tokens from 1 on, or None for all")
    if len(sinks) != len(shape.windows) or any(not isinstance(n, int) or n < 0 for n in sinks):
        raise ConfigError(
            f"sinks={sinks!r}: a number of tokens from 0 on, or one for each of the "
            f"{len(shape.windows)} layers"
        )


def _groups(
    spans: list[Span], window: int | None, sinks: int, length: int, full: Callable[[int], Store]
) -> list[tuple[list[int], Store]]:
    """Heads of one span together, and their store."""
    if window is not None:
        sinks, spans = 0, [window if span is None else min(span, window) for span in spans]
    needed = [None if span is None or span + sinks >= length else span for span in spans]
    return [
        (
            [head for head, span in enumerate(needed) if span == wanted],
            full(length) if wanted is None else WindowStore(wanted, sinks),
        )
        for wanted in dict.fromkeys(needed)
    ]
