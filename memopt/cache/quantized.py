"""A cache of 8 or 4 bits a number, whose newest and first tokens stay as they are.

A few channels of keys are large in all tokens, so keys have a step for each channel of a block of
tokens; values have none such, and a step for each token. The newest two blocks are in full
precision, as a block's steps are known when it is full. So are the first tokens of a sequence, its
sinks: much of all attention goes to them, so that an error there is in every result, and their
keys are unlike others, so that they would make the steps of their block large. What nobody reads
from a block, sinks and padding, does not count for its steps.

Sources: steps by channel and by token, and the newest tokens as they are: KIVI, Liu et al.
(2024), arXiv:2402.02750; the first token as it is: KVQuant, Hooper et al. (2024),
arXiv:2401.18079.

Legend: as in `memopt.cache.rows`; ``R`` tokens of a block, ``M`` blocks, ``S`` sinks.
"""

from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from memopt.cache.codes import Coded, check_bits, relative_error
from memopt.cache.columns import ColumnStore
from memopt.cache.layer import HeadCache, HeadLayer
from memopt.cache.shape import Shape, checked_length
from memopt.cache.spans import WindowStore
from memopt.cache.store import Step
from memopt.errors import ConfigError

_BLOCKS_AT_ONCE = 8  # of a prompt, so that the float32 copies stay small


class QuantizedStore(ColumnStore):
    """Blocks of codes, a ring of the newest ``2 * R`` tokens and ``S`` sinks as they are.

    Attention is computed for one head of keys at a time, which alone exists in full precision.

    Args:
        max_length: columns that there will be at most.
        bits: 8 or 4.
        group: ``R``.
        sinks: ``S``.
    """

    BATCHED: ClassVar[tuple[str, ...]] = ("sink_columns",)

    def __init__(self, max_length: int, bits: int = 4, group: int = 128, sinks: int = 4) -> None:
        check_bits(bits, group, sinks)
        super().__init__(max_length)
        self.bits, self.group, self.sinks = bits, group, sinks
        self.blocks = max(2, -(-max_length // group))
        self.ring = 2 * group

    @property
    def at_once(self) -> int:
        return 1

    def parts(self) -> list[Any]:
        return [self, self.keys, self.values]

    def allocate(self, k: Tensor, v: Tensor) -> None:
        self.keys = Coded(k, self.blocks, self.group, self.sinks, self.bits, dim=3)
        self.values = Coded(v, self.blocks, self.group, self.sinks, self.bits, dim=4)
        self.sink_columns = k.new_full((len(k), self.sinks), -1, dtype=torch.int64)

    def bytes_for(self, batch: int, heads: int, widths: tuple[int, int], itemsize: int) -> int:
        columns, both = self.blocks * self.group, sum(widths)
        codes = columns * both * self.bits // 8
        steps = 2 * (self.blocks * widths[0] + columns) * itemsize
        whole = (self.ring + self.sinks) * both * itemsize
        return batch * heads * (codes + steps + whole) + 8 * batch * self.sinks + 16

    def reset(self) -> None:
        super().reset()
        self.sink_columns.fill_(-1)

    def write(self, step: Step, k: Tensor, v: Tensor) -> None:
        self._write_sinks(step, k, v)
        if k.shape[2] > 1:
            self._write_many(step, k, v)
            return
        self.keys.put_newest(step.columns, k)
        self.values.put_newest(step.columns, v)
        if step.first is None or (step.first % self.group == 0 and step.first >= self.group):
            self._write_last_block(step)

    def _write_last_block(self, step: Step) -> None:
        """Codes of the newest block that is full.

        Compiled code does so at every token, as it cannot ask which one it is; the codes are the
        same each time, and the ring hides them until the block has left it.
        """
        block = (step.columns // self.group - 1).clamp(min=0)
        slots = block % 2 * self.group + torch.arange(self.group, device=block.device)
        is_new = (step.columns % self.group == 0) & (step.columns >= self.group)
        for coded in (self.keys, self.values):
            x = self._as_read(coded.newest.index_select(2, slots), block, step)
            coded.put_blocks(block, x, is_new.float())

    def _write_many(self, step: Step, k: Tensor, v: Tensor) -> None:
        if step.first is None or step.stop is None:
            raise ConfigError(
                "a prompt was compiled: a QuantizedCache takes it in uncompiled code; compile the "
                "steps of one token, as generate() does"
            )
        start = max(0, step.first - 1) // self.group * self.group  # of the first block to write
        stop = (step.stop - 1) // self.group * self.group
        past = torch.arange(start, step.first, device=k.device) % self.ring
        for coded, new in ((self.keys, k), (self.values, v)):
            older = coded.newest.index_select(2, past)
            for first in range(start, stop, _BLOCKS_AT_ONCE * self.group):
                last = min(stop, first + _BLOCKS_AT_ONCE * self.group)
                blocks = torch.arange(first // self.group, last // self.group, device=k.device)
                x = _between(older, new, first - start, last - start)
                coded.put_blocks(blocks, self._as_read(x, blocks, step))
            tail = slice(max(0, k.shape[2] - self.ring), None)
            coded.put_newest(step.columns[tail], new[:, :, tail])

    def _as_read(self, x: Tensor, blocks: Tensor, step: Step) -> Tensor:
        """Blocks `(B, H, blocks * R, D)`, with their last token for sinks and for padding."""
        columns = blocks[:, None] * self.group + torch.arange(self.group, device=x.device)
        columns = columns.flatten()
        unread = (self.sink_columns[:, :, None] == columns).any(1)
        if step.padding is not None:
            unread = unread | ~step.padding.index_select(1, columns)
        last = x[:, :, self.group - 1 :: self.group].repeat_interleave(self.group, 2)
        return torch.where(unread[:, None, :, None], last, x)

    def _write_sinks(self, step: Step, k: Tensor, v: Tensor) -> None:
        """Where there are fewer tokens than sinks, the first one stands for the others too."""
        there = torch.arange(self.sinks, device=k.device)[:, None]
        position = step.positions[:, None]
        fits = 2 * (position == there).int() + (position == 0).int()
        if step.real is not None:
            fits = fits * step.real[:, None]
        fit, column = fits.max(2)
        is_new = fit > 0
        self.sink_columns.copy_(torch.where(is_new, step.columns[column], self.sink_columns))
        self.keys.put_sinks(is_new, column, k)
        self.values.put_sinks(is_new, column, v)

    def read(self, heads: slice, stop: int, step: Step) -> tuple[Tensor, Tensor]:
        slots = torch.arange(self.ring, device=step.columns.device)
        turns = (step.columns[-1] - slots).clamp(min=0) // self.ring
        newest = slots + turns * self.ring  # a slot not yet written stands for a column to come
        blocks = max(2, -(-stop // self.group))
        k = self.keys.whole(heads, blocks, newest, self.sink_columns)
        v = self.values.whole(heads, blocks, newest, self.sink_columns)
        return k[:, :, :stop], v[:, :, :stop]


def _between(older: Tensor, new: Tensor, first: int, last: int) -> Tensor:
    """Some columns of two tensors of which one goes on where the other ends."""
    join = older.shape[2]
    parts = (older[:, :, first:last], new[:, :, max(0, first - join) : max(0, last - join)])
    return torch.cat(parts, 2)


class QuantizationError(NamedTuple):
    """What a layer's codes are off by: the root of the sum of squares, over that of the numbers.

    Attributes:
        keys: of all keys that are held as codes.
        values: of all values.
    """

    keys: float
    values: float


class QuantizedCache(HeadCache):
    """A cache of 8 or 4 bits a number.

    Pays: 4 bits are 0.27 of bfloat16's bytes, 8 bits 0.52, at heads of 128. Does not: for short
    contexts, where the newest tokens are most of them; and it is lossy, so ask `errors`, and
    compare results. Each step makes a head's keys and values again, for the time of reading them
    once more.

    Args:
        config: the model's.
        max_length: tokens of the prompt and all that is generated, at most.
        bits: 8 or 4.
        group: tokens of a block; the newest two blocks are as they are.
        sinks: the first tokens of a sequence, which are as they are.

    Raises:
        ConfigError: for other bits, groups and sinks, or a model that has no such cache.
    """

    def __init__(
        self, config: Any, max_length: int, bits: int = 4, group: int = 128, sinks: int = 4
    ) -> None:
        shape, length = Shape.of(config), checked_length(max_length)
        super().__init__(
            [_layer(shape, window, length, bits, group, sinks) for window in shape.windows]
        )

    def errors(self) -> list[QuantizationError]:
        """For each layer, what its codes are off by; 0 where there are none yet."""
        return [_error(layer) for layer in self.layers]


def _layer(
    shape: Shape, window: int | None, length: int, bits: int, group: int, sinks: int
) -> HeadLayer:
    """A layer with a window of its own holds that, as it is: it is about as short as the ring."""
    store = (
        QuantizedStore(length, bits, group, sinks)
        if window is None or window >= length
        else WindowStore(window, 0)
    )
    return HeadLayer([(range(shape.heads), store)], length)


def _error(layer: HeadLayer) -> QuantizationError:
    stores = [s for s in layer.stores if isinstance(s, QuantizedStore) and layer.is_initialized]
    return QuantizationError(
        relative_error([store.keys.squares for store in stores]),
        relative_error([store.values.squares for store in stores]),
    )
