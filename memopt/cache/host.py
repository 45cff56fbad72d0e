"""A cache on the host, of which the device holds a few heads at a time; exact.

Attention needs one head's keys at a time, so two places on the device, of a few heads each, are
enough for all layers: while one is attended over, the next heads are on their way into the other.
New tokens alone go out to the host. On a GPU the host's memory is pinned and copies run on a
stream beside the step's. On the CPU, which has one memory, the host's is outside torch's
allocator, so that bytes are the same as on a GPU.

Source: HeadInfer, Luo et al. (2025), arXiv:2502.12574.

Legend: as in `memopt.cache.rows`; ``A`` heads are on the device at once.
"""

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor

from memopt.cache.columns import ColumnStore
from memopt.cache.layer import HeadCache, HeadLayer
from memopt.cache.shape import Shape, checked_length
from memopt.cache.spans import WindowStore
from memopt.cache.store import Step
from memopt.errors import ConfigError, HostMemoryError
from memopt.kernels.arena import Arena
from memopt.units import format_bytes


class Stage:
    """Two places on the device that all stores of a cache share.

    Args:
        heads: ``A``.
    """

    def __init__(self, heads: int = 1) -> None:
        if not isinstance(heads, int) or heads < 1:
            raise ConfigError(f"heads={heads!r}: a number of heads from 1 on")
        self.heads, self.max_length = heads, 0
        self.arena = Arena()
        self.stores: list[HostStore] = []
        self.places: list[tuple[Tensor, Tensor]] = []
        self.stream: torch.cuda.Stream | None = None  # made where it is first needed
        self._coming: tuple[HostStore, int, int] | None = None
        self._turn = 0

    def store(self, max_length: int) -> "HostStore":
        """A store whose heads pass through here, after those of the stores before it."""
        self.stores.append(HostStore(max_length, self))
        self.max_length = max(self.max_length, max_length)
        return self.stores[-1]

    def bytes_for(self, batch: int, widths: tuple[int, int], itemsize: int) -> int:
        """Bytes on the device, by formula; once, however many stores there are."""
        return 2 * batch * self.heads * self.max_length * sum(widths) * itemsize

    def allocate(self, k: Tensor, v: Tensor) -> None:
        """Make the places, where the first store has not done so.

        Raises:
            ConfigError: they are on another device.
        """
        if self.places:
            if self.places[0][0].device != k.device:
                raise ConfigError(
                    f"layers on {self.places[0][0].device} and {k.device}: a HostCache serves a "
                    "model on one device; make a HeadCache of a Stage's stores for each"
                )
            return

        def place(x: Tensor) -> Tensor:
            return x.new_zeros(len(x), self.heads, self.max_length, x.shape[3])

        self.places = [(place(k), place(v)) for _ in range(2)]

    def host_empty(self, shape: tuple[int, ...], like: Tensor) -> Tensor:
        """Memory of the host's, zeros.

        Raises:
            HostMemoryError: the host has no more.
        """
        if not like.is_cuda:
            return self.arena.empty_like(torch.empty(shape, dtype=like.dtype, device="meta"))
        try:
            return torch.zeros(shape, dtype=like.dtype, pin_memory=True)
        except RuntimeError as error:
            nbytes = torch.empty(shape, dtype=like.dtype, device="meta").nbytes
            raise HostMemoryError(
                f"the host has no {format_bytes(nbytes)} more to pin ({error}): make the cache "
                "with a smaller max_length, or hold some layers on the device"
            ) from error

    def take(
        self, store: "HostStore", group: int, least: int
    ) -> tuple[int, tuple[Tensor, Tensor]]:
        """A place with the keys and values of one group of heads, and the next group on its way.

        Args:
            store: whose heads.
            group: which of them.
            least: columns that must be there.

        Returns:
            The columns that are there, and their keys and values.
        """
        if self._coming is None or self._coming[:2] != (store, group) or self._coming[2] < least:
            self._fetch(store, group)
        assert self._coming is not None, "bug in memopt"
        columns, place = self._coming[2], self.places[self._turn]
        if self.stream is not None:
            torch.cuda.current_stream(place[0].device).wait_stream(self.stream)
        self._turn = 1 - self._turn
        self._fetch(*self._after(store, group))
        return columns, place

    def _after(self, store: "HostStore", group: int) -> tuple["HostStore", int]:
        if group + 1 < store.groups:
            return store, group + 1
        return self.stores[(self.stores.index(store) + 1) % len(self.stores)], 0

    def _fetch(self, store: "HostStore", group: int) -> None:
        """Start copies into the place whose turn it is; no attention over it is still to come."""
        self._coming = (store, group, store.held)
        heads = range(group * self.heads, min(store.heads, (group + 1) * self.heads))
        with self.beside():
            for place, master in zip(self.places[self._turn], store.master, strict=False):
                for at, head in enumerate(heads):
                    for row in range(len(master)):
                        there = master[row, head, : store.held]
                        place[row, at, : store.held].copy_(there, non_blocking=True)

    def beside(self) -> Any:
        """Run on the stream of copies, after all that the step has enqueued so far."""
        device = self.places[0][0].device
        if device.type == "cuda":
            self.stream = self.stream or torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
            self.stream.wait_stream(torch.cuda.current_stream(device))
        return torch.cuda.stream(self.stream)

    def __getstate__(self) -> dict[str, Any]:
        """For ``copy.deepcopy``: a copy has a stream of its own."""
        self.settle()
        return self.__dict__ | {"stream": None}

    def settle(self) -> None:
        """Wait for all copies, and forget what is on its way: the host's memory will change."""
        self._coming = None
        if self.stream is not None:
            self.stream.synchronize()


class HostStore(ColumnStore):
    """Keys and values on the host: `(B, H, N, D)`; see `Stage.store`.

    Args:
        max_length: columns that there will be at most.
        stage: through which its heads pass.
    """

    BATCHED: ClassVar[tuple[str, ...]] = ()
    compileable: ClassVar[bool] = False  # the host decides what to copy

    def __init__(self, max_length: int, stage: Stage) -> None:
        super().__init__(max_length)
        self.stage = stage
        self.master: tuple[Tensor, ...] = ()
        self.heads = self.held = 0

    def __getstate__(self) -> dict[str, Any]:
        """For ``copy.deepcopy``, which reads what copies may still be writing."""
        self.stage.settle()
        return self.__dict__

    @property
    def at_once(self) -> int:
        return self.stage.heads

    @property
    def groups(self) -> int:
        """Groups of heads that are on the device one after another."""
        return -(-self.heads // self.stage.heads)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def allocate(self, k: Tensor, v: Tensor) -> None:
        self.stage.allocate(k, v)
        self.heads = k.shape[1]

        def room(x: Tensor) -> Tensor:
            shape = (len(x), self.heads, self.max_length, x.shape[3])
            return self.stage.host_empty(shape, x)

        self.master = (room(k), room(v))

    def tensors(self) -> list[Tensor]:
        return [x for place in self.stage.places for x in place]

    def bytes_for(self, batch: int, heads: int, widths: tuple[int, int], itemsize: int) -> int:
        return 0  # the stage's are counted once

    @property
    def shared(self) -> Stage:
        return self.stage

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def attend(self, step: Step, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        self._new = (k, v)
        step = step._replace(first=int(step.columns[0]))  # what compiled code does not know
        try:
            return super().attend(step, q, k, v, scale)
        finally:
            del self._new

    def write(self, step: Step, k: Tensor, v: Tensor) -> None:
        first, stop = self.held, self.held + len(step.columns)
        whole = (k.contiguous(), v.contiguous())  # here, so that copies alone are beside the step
        with self.stage.beside():
            for held, new in zip(self.master, whole, strict=True):
                for row in range(new.shape[0]):
                    for head in range(new.shape[1]):
                        held[row, head, first:stop].copy_(new[row, head], non_blocking=True)
                if self.stage.stream is not None:
                    new.record_stream(self.stage.stream)
        self.held = stop

    def read(self, heads: slice, stop: int, step: Step) -> tuple[Tensor, Tensor]:
        first, width = stop - len(step.columns), heads.stop - heads.start
        columns, place = self.stage.take(self, heads.start // width, first)
        there = range(heads.start, min(heads.stop, self.heads))
        for held, new in zip(place, self._new, strict=True):
            held[:, : len(there), columns:stop] = new[:, heads, columns - first :]
        k, v = (held[:, : len(there), :stop] for held in place)
        return k, v

    def reset(self) -> None:
        self.stage.settle()
        self.held = 0

    def reorder(self, rows: Tensor) -> None:
        self.stage.settle()
        rows = rows.cpu()
        for master in self.master:
            for head in range(self.heads):  # so that a copy of one head is all there is besides
                master[:, head] = master[:, head].index_select(0, rows)

    def replace_batch(self, change: Callable[[Tensor], Tensor]) -> None:
        self.stage.settle()
        places = self.stage.places[0]
        changed = [change(master) for master in self.master]
        if len(places[0]) != len(changed[0]):
            self.stage.places = []
            like = [place.new_empty(len(changed[0]), 0, 0, place.shape[3]) for place in places]
            self.stage.allocate(*like)
        self.master = tuple(
            self.stage.host_empty(tuple(x.shape), place).copy_(x)
            for x, place in zip(changed, places, strict=True)
        )


class HostCache(HeadCache):
    """A cache on the host, of which the device holds ``2 * A`` heads.

    Pays: on a GPU the bytes of two heads are left of all layers' heads; results are those of a
    cache on the device. Does not: in decoding by few sequences at once, as all keys cross the
    link for every token: 16 GiB at 25 GB/s are 0.7 s. It does not compile whole; copies are the
    host's to decide.

    Args:
        config: the model's.
        max_length: tokens of the prompt and all that is generated, at most.
        heads: ``A``, of keys, that one place on the device has room for.

    Raises:
        ConfigError: for other numbers, or a model that has no such cache.
    """

    def __init__(self, config: Any, max_length: int, heads: int = 1) -> None:
        shape, length = Shape.of(config), checked_length(max_length)
        self.stage = Stage(heads)
        stores = [
            self.stage.store(length)
            if window is None or window >= length
            else WindowStore(window, 0)
            for window in shape.windows
        ]
        super().__init__([HeadLayer([(range(shape.heads), store)], length) for store in stores])

    def host_bytes(self) -> int:
        """Bytes that are held on the host."""
        return sum(
            x.untyped_storage().nbytes()
            for store in self.stores()
            if isinstance(store, HostStore)
            for x in store.master
        )
