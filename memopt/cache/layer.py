"""A cache's layer: heads of keys in groups, and for each group a store that holds and attends.

Transformers' models hand a cache new keys and values, and hand attention whatever the cache
returns. Here that is a `Pending`: the new tensors and the layer that will hold them. The
attention function that `memopt.cache.attention` registers gives it the queries, and each store
attends over what it holds in the form in which it holds it. So nothing is widened, joined or
expanded that a store need not.

Legend: as in `memopt.cache.rows`.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from memopt._torch import mark_static_address
from memopt._transformers import Cache, CacheLayerMixin
from memopt.cache.rows import grouped_queries
from memopt.cache.store import Step, Store
from memopt.errors import ConfigError
from memopt.memory.meter import storage_key


class Pending:
    """New keys and values on their way into a layer, where models expect tensors."""

    def __init__(self, layer: "HeadLayer", keys: Tensor, values: Tensor) -> None:
        self.layer, self.keys, self.values = layer, keys, values

    def __getattr__(self, name: str) -> Any:
        raise ConfigError(
            f"this model's attention asks for the {name!r} of keys that a memopt cache holds in a "
            "form of its own: call memopt.cache.prepare(model) before the first step"
        )


class HeadLayer(CacheLayerMixin):  # type: ignore[misc]
    """One layer's keys and values.

    Args:
        groups: heads of keys, by index, and the store for them; each head in one group.
        max_length: columns that there will be at most.

    Raises:
        ConfigError: the groups do not share out the heads.
    """

    is_sliding = False
    is_croppable = False

    def __init__(self, groups: Sequence[tuple[Sequence[int], Store]], max_length: int) -> None:
        super().__init__()
        self.heads = [list(heads) for heads, _ in groups]
        self.stores = [store for _, store in groups]
        self.max_length = max_length
        self.order = [head for heads in self.heads for head in heads]
        if sorted(self.order) != list(range(len(self.order))):
            raise ConfigError(f"heads {self.order}: each head from 0 on is in one group")
        self.known: int | None = 0  # columns so far; None after compiled code has added some

    @property
    def is_compileable(self) -> bool:
        return all(store.compileable for store in self.stores)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        if key_states.shape[1] != len(self.order):
            raise ConfigError(
                f"a layer with {key_states.shape[1]} heads of keys: the cache was made for "
                f"{len(self.order)}; make it from this model's config"
            )
        device = key_states.device
        self.dtype, self.device, self.batch_size = key_states.dtype, device, len(key_states)
        self.seen = torch.zeros((), dtype=torch.int64, device=device)
        self.lengths = torch.zeros(self.batch_size, dtype=torch.int64, device=device)
        joined = torch.tensor(self.order, device=device)
        self.places = [torch.tensor(heads, device=device) for heads in self.heads]
        self.inverse = joined.argsort()
        for place, store in zip(self.places, self.stores, strict=True):
            store.allocate(key_states[:, place, :0], value_states[:, place, :0])
        if not torch.compiler.is_compiling():
            for held in self.tensors():
                mark_static_address(held)
        self.is_initialized = True

    def tensors(self) -> list[Tensor]:
        """All that the layer holds on the device."""
        own = [self.seen, self.lengths, self.inverse, *self.places]
        return own + [held for store in self.stores for held in store.tensors()]

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> Any:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        if len(key_states) != self.batch_size:
            raise ConfigError(
                f"{len(key_states)} sequences: the cache holds {self.batch_size}, beams included; "
                "make another for another batch"
            )
        pending = Pending(self, key_states, value_states)
        return pending, pending

    def attend(self, q: Tensor, new: Pending, padding: Tensor | None, scale: float) -> Tensor:
        """Take the new keys and values in, and give the attention of the new queries.

        Args:
            q: `(B, H * G, n, D)`.
            new: what ``update`` returned.
            padding: `(B, N)`, False in columns of padding, or None.
            scale: of the scores.

        Returns:
            `(B, H * G, n, E)`.
        """
        k, v = new.keys.detach(), new.values.detach()
        step = self._advance(k.shape[2], padding)
        grouped = grouped_queries(q, k.shape[1])
        if len(self.stores) == 1:
            return self.stores[0].attend(step, grouped, k, v, scale).flatten(1, 2)
        parts = [
            store.attend(
                step,
                grouped.index_select(1, place),
                k.index_select(1, place),
                v.index_select(1, place),
                scale,
            )
            for place, store in zip(self.places, self.stores, strict=True)
        ]
        return torch.cat(parts, 1).index_select(1, self.inverse).flatten(1, 2)

    def _advance(self, n: int, padding: Tensor | None) -> Step:
        columns = torch.arange(n, device=self.device) + self.seen
        first = self._first(n)
        past = self.lengths.clone()
        real = None if padding is None else padding.index_select(1, columns)
        before = torch.arange(n, device=self.device) if real is None else real.cumsum(1) - 1
        self.seen.add_(n)
        self.lengths.add_(n if real is None else real.sum(1))
        return Step(columns, first, past[:, None] + before, past, real, padding)

    def _first(self, n: int) -> int | None:
        """The first new column, where it is known; raises where there is no room."""
        if torch.compiler.is_compiling():
            self.known = None  # written, not read: a guard on it would compile for each length
            return None
        first = int(self.seen) if self.known is None else self.known
        if first + n > self.max_length:
            raise ConfigError(
                f"{first + n} tokens: the cache has room for max_length={self.max_length}; "
                "make it with room for the prompt and all that is generated"
            )
        self.known = first + n
        return first

    def get_seq_length(self) -> Any:
        return self.seen if self.is_initialized else 0

    def get_max_length(self) -> int:
        return self.max_length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.max_length, 0

    def reset(self) -> None:
        self.known = 0
        if self.is_initialized:
            self.seen.zero_()
            self.lengths.zero_()
            for store in self.stores:
                store.reset()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        if self.is_initialized:
            self.lengths.copy_(self.lengths[beam_idx.to(self.device)])
            for store in self.stores:
                store.reorder(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._replace_batch(lambda held: held.repeat_interleave(repeats, 0))

    def batch_select_indices(self, indices: Tensor) -> None:
        self._replace_batch(lambda held: held[indices.to(held.device)])

    def _replace_batch(self, change: Callable[[Tensor], Tensor]) -> None:
        if self.is_initialized:
            self.lengths = change(self.lengths)
            self.batch_size = len(self.lengths)
            for store in self.stores:
                store.replace_batch(change)

    def crop(self, tokens_to_remove: int) -> None:
        raise ConfigError(
            f"crop({tokens_to_remove}): what these caches have let go of cannot come back; "
            "generate without an assistant"
        )

    def bytes_for(self, batch: int, widths: tuple[int, int], itemsize: int) -> int:
        """Bytes on the device, by formula, without what it shares with other layers."""
        counters = 8 + 8 * batch + 2 * 8 * len(self.order)
        return counters + sum(
            store.bytes_for(batch, len(heads), widths, itemsize)
            for heads, store in zip(self.heads, self.stores, strict=True)
        )


class HeadCache(Cache):  # type: ignore[misc]
    """A cache of such layers, of one kind or of several.

    Args:
        layers: one for each of the model's, as in ``[*a.layers[:8], *b.layers[8:]]``.
    """

    layers: list[HeadLayer]

    def __init__(self, layers: Sequence[HeadLayer]) -> None:
        super().__init__(layers=list(layers))

    def stores(self) -> Iterator[Store]:
        """The stores of all layers, in the order in which a step uses them."""
        return (store for layer in self.layers for store in layer.stores)

    def held_bytes(self) -> int:
        """Bytes of the memory that is held on the device, each storage once."""
        storages = {
            storage_key(held): held.untyped_storage().nbytes()
            for layer in self.layers
            if layer.is_initialized
            for held in layer.tensors()
        }
        return sum(storages.values())

    def bytes_for(
        self,
        batch: int,
        widths: int | tuple[int, int],
        dtype: torch.dtype = torch.bfloat16,
    ) -> int:
        """What `held_bytes` will be, by formula, before anything is held.

        Args:
            batch: sequences, with the beams of each.
            widths: entries of a key and of a value, or one number for both: the model's
                ``head_dim``.
            dtype: of the model's keys and values.
        """
        both = (widths, widths) if isinstance(widths, int) else widths
        own = sum(layer.bytes_for(batch, both, dtype.itemsize) for layer in self.layers)
        shared = {store.shared for store in self.stores()} - {None}
        return own + sum(int(each.bytes_for(batch, both, dtype.itemsize)) for each in shared)
