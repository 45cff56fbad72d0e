"""Stores that hold a key for every column: whole, and in other forms that subclasses give.

Legend: as in `memopt.cache.rows`; ``N`` is ``max_length``.
"""

import torch
from torch import Tensor

from memopt.cache.rows import attended, causal, over_columns
from memopt.cache.store import Step, Store


class ColumnStore(Store):
    """A store with a key for every column, which attends over some heads at a time.

    A subclass takes new columns in (``write``) and gives the keys and values of some heads
    (``read``). Only those of ``at_once`` heads exist in full precision on the device at a time.

    Args:
        max_length: columns that there will be at most.
    """

    def __init__(self, max_length: int) -> None:
        self.max_length = max_length

    def write(self, step: Step, k: Tensor, v: Tensor) -> None:
        """Take new columns in."""
        raise NotImplementedError

    def read(self, heads: slice, stop: int, step: Step) -> tuple[Tensor, Tensor]:
        """Keys and values of these heads in the columns before ``stop``."""
        raise NotImplementedError

    @property
    def at_once(self) -> int | None:
        """Heads that are read at a time; None for all."""
        return None

    def attend(self, step: Step, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        self.write(step, k, v)
        if step.first == 0 and step.padding is None and q.shape[3] > 1:
            return causal(q, k, v, scale)
        if step.first == 0 and step.stop is not None:
            return over_columns(q, k, v, step.columns, step.padding, scale)
        stop = self.max_length if step.stop is None else step.stop
        width = self.at_once or k.shape[1]
        parts = []
        for first in range(0, k.shape[1], width):
            heads = slice(first, first + width)
            keys, values = self.read(heads, stop, step)
            parts.append(self._over(step, q[:, heads], keys, values, scale))
        return torch.cat(parts, 1) if len(parts) > 1 else parts[0]

    @staticmethod
    def _over(step: Step, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        if q.shape[3] == 1 and step.padding is None and step.stop is not None:
            return attended(q, k, v, None, scale)
        return over_columns(q, k, v, step.columns, step.padding, scale)


class FullStore(ColumnStore):
    """Keys and values as they come, in room for all columns: `(B, H, N, D)`."""

    def allocate(self, k: Tensor, v: Tensor) -> None:
        def room(x: Tensor) -> Tensor:
            return x.new_zeros(*x.shape[:2], self.max_length, x.shape[3])

        self.keys, self.values = room(k), room(v)

    def write(self, step: Step, k: Tensor, v: Tensor) -> None:
        self.keys.index_copy_(2, step.columns, k)
        self.values.index_copy_(2, step.columns, v)

    def read(self, heads: slice, stop: int, step: Step) -> tuple[Tensor, Tensor]:
        return self.keys[:, heads, :stop], self.values[:, heads, :stop]

    def bytes_for(self, batch: int, heads: int, widths: tuple[int, int], itemsize: int) -> int:
        return batch * heads * self.max_length * sum(widths) * itemsize
