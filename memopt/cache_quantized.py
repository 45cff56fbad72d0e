"""A cache of 8 or 4 bits a number, whose newest and first tokens stay as they are.

A few channels of keys are large in all tokens, so keys have a step for each channel of a block of
tokens; values have none such, and a step for each token. The newest two blocks are in full
precision, as a block's steps are known when it is full. So are the first tokens of a sequence, its
sinks: much of all attention goes to them, so that an error there is in every result, and their keys
are unlike others, so that they would make the steps of their block large.

Sources: steps by channel and by token, and the newest tokens as they are: KIVI, Liu et al. (2024),
arXiv:2402.02750; the first token as it is: KVQuant, Hooper et al. (2024), arXiv:2401.18079.

Legend: as in `memopt.cache_rows`; ``R`` tokens of a block, ``M`` blocks, ``S`` sinks.
"""

from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from memopt.cache_codes import check_bits, decode, encode
from memopt.cache_columns import ColumnStore
from memopt.cache_layer import HeadCache, HeadLayer, Step
from memopt.cache_shape import Shape, checked_length
from memopt.cache_spans import WindowStore
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

    BATCHED: ClassVar[tuple[str, ...]] = (
        *("key_codes", "key_step", "key_zero", "value_codes", "value_step", "value_zero"),
        *("recent_keys", "recent_values", "sink_keys", "sink_values", "sink_columns"),
    )
    SHARED: ClassVar[tuple[str, ...]] = ("errors",)

    def __init__(
        self, max_length: int, bits: int = 4, group: int = 128, sinks: int = 4
    ) -> None:
        check_bits(bits, group, sinks)
        super().__init__(max_length)
        self.bits, self.group, self.sinks = bits, group, sinks
        self.blocks = max(2, -(-max_length // group))
        self.ring = 2 * group

    @property
    def at_once(self) -> int:
        return 1

    def allocate(self, k: Tensor, v: Tensor) -> None:
        b, h, _, d = k.shape
        e, m, r = v.shape[3], self.blocks, self.group
        if self.bits == 4 and (d % 2 or e % 2):
            raise ConfigError(f"heads of {d} and {e} entries: 4 bits need even numbers; use bits=8")
        packed = {width: k.new_zeros(b, h, m, r, width * self.bits // 8, dtype=torch.uint8) for width in (d, e)}
        self.key_codes, self.value_codes = packed[d], packed[e].clone()
        self.key_step, self.key_zero = k.new_zeros(b, h, m, 1, d), k.new_zeros(b, h, m, 1, d)
        self.value_step, self.value_zero = v.new_zeros(b, h, m, r, 1), v.new_zeros(b, h, m, r, 1)
        self.recent_keys, self.recent_values = (
            x.new_zeros(b, h, self.ring, x.shape[3]) for x in (k, v)
        )
        self.sink_keys, self.sink_values = (
            x.new_zeros(b, h, self.sinks, x.shape[3]) for x in (k, v)
        )
        self.sink_columns = k.new_full((b, self.sinks), -1, dtype=torch.int64)
        self.errors = k.new_zeros(2, 2, dtype=torch.float32)

    def bytes_for(self, batch: int, heads: int, widths: tuple[int, int], itemsize: int) -> int:
        columns, both = self.blocks * self.group, sum(widths)
        codes = columns * both * self.bits // 8
        steps = 2 * (self.blocks * widths[0] + columns) * itemsize
        whole = (self.ring + self.sinks) * both * itemsize
        return batch * heads * (codes + steps + whole) + 8 * batch * self.sinks + 16

    def reset(self) -> None:
        self.sink_columns.fill_(-1)
        self.errors.zero_()

    def write(self, step: Step, k: Tensor, v: Tensor) -> None:
        self._write_sinks(step, k, v)
        if k.shape[2] > 1:
            self._write_many(step, k, v)
            return
        slot = step.columns % self.ring
        self.recent_keys.index_copy_(2, slot, k)
        self.recent_values.index_copy_(2, slot, v)
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
        k, v = (x.index_select(2, slots) for x in (self.recent_keys, self.recent_values))
        self._write_blocks(block, k[:, :, None], v[:, :, None], is_new)

    def _write_many(self, step: Step, k: Tensor, v: Tensor) -> None:
        if step.first is None or step.stop is None:
            raise ConfigError(
                "a prompt was compiled: a QuantizedCache takes it in uncompiled code; compile the "
                "steps of one token, as generate() does"
            )
        start = max(0, step.first - 1) // self.group * self.group
        stop = (step.stop - 1) // self.group * self.group
        past = torch.arange(start, step.first, device=k.device) % self.ring
        for first in range(start, stop, _BLOCKS_AT_ONCE * self.group):
            last = min(stop, first + _BLOCKS_AT_ONCE * self.group)
            blocks = torch.arange(first // self.group, last // self.group, device=k.device)
            columns = slice(first, last)
            parts = (
                _columns(held, new, past, step.first, start, columns).unflatten(2, (-1, self.group))
                for held, new in ((self.recent_keys, k), (self.recent_values, v))
            )
            self._write_blocks(blocks, *parts)
        newest = slice(max(0, k.shape[2] - self.ring), None)
        slots = step.columns[newest] % self.ring
        self.recent_keys.index_copy_(2, slots, k[:, :, newest])
        self.recent_values.index_copy_(2, slots, v[:, :, newest])

    def _write_blocks(self, blocks: Tensor, k: Tensor, v: Tensor, counted: Tensor | int = 1) -> None:
        """Codes of blocks `(B, H, blocks, R, D)`, and the error that they make, where it counts."""
        for name, row, x, dim in (("key", 0, k, 3), ("value", 1, v, 4)):
            made = encode(x, dim, self.bits)
            for part, kind in zip(made, ("codes", "step", "zero"), strict=True):
                getattr(self, f"{name}_{kind}").index_copy_(2, blocks, part)
            wide = x.to(torch.float32)
            off = decode(*made, self.bits).to(torch.float32) - wide
            self.errors[row, 0].add_((off.square().sum() * counted).squeeze())
            self.errors[row, 1].add_((wide.square().sum() * counted).squeeze())

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
        for held, new in ((self.sink_keys, k), (self.sink_values, v)):
            index = column[:, None, :, None].expand(-1, held.shape[1], -1, held.shape[3])
            held.copy_(torch.where(is_new[:, None, :, None], new.gather(2, index), held))

    def read(self, heads: slice, stop: int, step: Step) -> tuple[Tensor, Tensor]:
        blocks = max(2, -(-stop // self.group))
        slots = torch.arange(self.ring, device=step.columns.device)
        turns = (step.columns[-1] - slots).clamp(min=0) // self.ring
        newest = slots + turns * self.ring  # a slot not yet written stands for a column to come
        return (
            self._whole("key", heads, blocks, newest)[:, :, :stop],
            self._whole("value", heads, blocks, newest)[:, :, :stop],
        )

    def _whole(self, name: str, heads: slice, blocks: int, newest: Tensor) -> Tensor:
        parts = (getattr(self, f"{name}_{kind}")[:, heads, :blocks] for kind in ("codes", "step", "zero"))
        x = decode(*parts, self.bits).flatten(2, 3)
        x = x.index_copy_(2, newest, getattr(self, f"recent_{name}s")[:, heads])
        index = self.sink_columns.clamp(min=0)[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3])
        is_there = (self.sink_columns >= 0)[:, None, :, None]
        sinks = torch.where(is_there, getattr(self, f"sink_{name}s")[:, heads], x.gather(2, index))
        return x.scatter_(2, index, sinks)


def _columns(
    ring: Tensor, new: Tensor, past: Tensor, first: int, start: int, columns: slice
) -> Tensor:
    """Some columns of the ring's, from ``start`` on, and of the new ones behind them."""
    older = past[columns.start - start : columns.stop - start]
    from_new = new[:, :, max(0, columns.start - first) : max(0, columns.stop - first)]
    return torch.cat([ring.index_select(2, older), from_new], 2) if len(older) else from_new


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
    sums = [s.errors for s in layer.stores if isinstance(s, QuantizedStore) and layer.is_initialized]
    if not sums:
        return QuantizationError(0.0, 0.0)
    off, whole = torch.stack(sums).sum(0).unbind(1)
    keys, values = (off / whole.clamp(min=torch.finfo(whole.dtype).tiny)).sqrt().tolist()
    return QuantizationError(keys, values)
