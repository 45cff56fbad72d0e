"""Watches what interpreted kernels touch: bounds, races, and bytes to and from memory.

Programs run one after another here, at the same time on a device. So an element that one program
writes and another one touches is a race, and since programs do not interleave, the first program
that read or wrote an element is enough to see it.
"""

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch

from bench.triton.mode import Access, Array, interpreting

SECTOR_BYTES = 32
_SHOWN = 20


class OutOfBoundsError(RuntimeError):
    """A kernel touched memory that none of its arguments covers."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Conflict:
    """Accesses to one element in no fixed order.

    Attributes:
        kind: ``"race"`` between programs; ``"twice"`` for one instruction that stores to the same
            place twice; ``"unordered"`` for a program that reads what it wrote with no barrier.
        argument: which one.
        element: offset from the argument's first.
        programs: the earlier one and the later one.
    """

    kind: Literal["race", "twice", "unordered"]
    argument: str
    element: int
    programs: tuple[int, int]


@dataclass(kw_only=True)
class Launch:
    """What one launch did.

    Attributes:
        kernel: the jitted function.
        arguments: by name, and the launch's options.
        programs: how many ran.
        requested_bytes: asked for by lanes that are not masked.
        l2_bytes: in whole sectors of 32 bytes, each instruction by itself: traffic between the
            processors and the shared cache if nothing is kept close to a processor.
        dram_bytes: in sectors, each counted once for reading and once for writing: traffic to
            memory if the shared cache keeps everything.
        conflicts: the first few.
    """

    kernel: Any
    arguments: Mapping[str, Any]
    programs: int = 0
    requested_bytes: int = 0
    l2_bytes: int = 0
    dram_bytes: int = 0
    conflicts: list[Conflict] = field(default_factory=list)

    @property
    def name(self) -> str:
        """The kernel's."""
        name: str = self.kernel.fn.__name__
        return name

    @property
    def coalescing(self) -> float:
        """Which share of the sectors that moved was asked for."""
        return self.requested_bytes / max(1, self.l2_bytes)


@contextlib.contextmanager
def trace() -> Iterator[list[Launch]]:
    """Watch all launches within; the list that it gives grows with them.

    Raises:
        OutOfBoundsError: from the launch that touches what is not its own.
    """
    tracer = Tracer()
    with interpreting(observer=tracer):
        yield tracer.launches


class _Region:
    """The memory of one argument, or of several that overlap.

    Attributes:
        name: of the arguments.
        start: address of the first byte.
        stop: address behind the last byte.
        itemsize: bytes of an element.
    """

    def __init__(self, name: str, start: int, stop: int, itemsize: int) -> None:
        self.name, self.start, self.stop, self.itemsize = name, start, stop, itemsize
        count = (stop - start) // itemsize
        self.reader, self.writer = (np.full(count, -1, np.int32) for _ in range(2))
        self.written = np.full(count, -1, np.int32)  # when, in barriers
        sectors = -(-stop // SECTOR_BYTES) - start // SECTOR_BYTES
        self.read_sectors, self.written_sectors = (np.zeros(sectors, bool) for _ in range(2))

    @property
    def sectors(self) -> int:
        return int(self.read_sectors.sum() + self.written_sectors.sum())


class Tracer:
    """Observes launches; see `trace`."""

    def __init__(self) -> None:
        self.launches: list[Launch] = []

    def begin(self, kernel: Any, arguments: Mapping[str, Any]) -> None:
        self.launches.append(Launch(kernel=kernel, arguments=arguments))
        self._regions = _regions(arguments)
        self._starts = np.array([region.start for region in self._regions], np.uint64)
        self._program, self._barriers = -1, 0

    def program(self, index: int) -> None:
        self.launches[-1].programs += 1
        self._program = index
        self._barriers += 1

    def barrier(self) -> None:
        self._barriers += 1

    def end(self) -> None:
        sectors = sum(region.sectors for region in self._regions)
        self.launches[-1].dram_bytes = sectors * SECTOR_BYTES

    def access(self, kind: Access, addresses: Array, itemsize: int) -> None:
        if not addresses.size:
            return
        launch = self.launches[-1]
        launch.requested_bytes += addresses.size * itemsize
        launch.l2_bytes += np.unique(addresses // SECTOR_BYTES).size * SECTOR_BYTES
        owner = np.searchsorted(self._starts, addresses, side="right") - 1
        for index in np.unique(owner):
            mine = addresses[owner == index].astype(np.int64)
            region = self._regions[max(0, index)]
            self._check(region, mine, itemsize, kind)
            sectors = mine // SECTOR_BYTES - region.start // SECTOR_BYTES
            if kind != "store":
                region.read_sectors[sectors] = True
            if kind != "load":
                region.written_sectors[sectors] = True
            elements = (mine - region.start) // itemsize
            if kind == "load":
                self._load(region, elements)
            elif kind == "store":
                self._store(region, elements)

    def _check(self, region: _Region, addresses: Array, itemsize: int, kind: str) -> None:
        outside = (addresses < region.start) | (addresses + itemsize > region.stop)
        if outside.any():
            first = int(addresses[outside][0])
            raise OutOfBoundsError(
                f"{self.launches[-1].name}, program {self._program}: {kind} of {itemsize} bytes "
                f"in {int(outside.sum())} lanes outside every argument; the first is "
                f"{first - region.stop:+d} bytes from the end of {region.name!r}, "
                f"which has {region.stop - region.start}"
            )
        assert itemsize == region.itemsize, (
            f"{region.name!r} has elements of {region.itemsize} bytes, "
            f"and a {kind} of {itemsize} bytes is not followed"
        )

    def _load(self, region: _Region, elements: Array) -> None:
        self._others(region, elements, region.writer)
        own = region.writer[elements] == self._program
        self._report("unordered", region, elements[own & (region.written[elements] == self._now)])
        new = elements[region.reader[elements] < 0]
        region.reader[new] = self._program

    def _store(self, region: _Region, elements: Array) -> None:
        self._others(region, elements, region.writer)
        self._others(region, elements, region.reader)
        if np.unique(elements).size < elements.size:
            self._report("twice", region, elements)
        new = elements[region.writer[elements] < 0]
        region.writer[new] = self._program
        region.written[elements] = self._now

    @property
    def _now(self) -> int:
        return self._barriers

    def _others(self, region: _Region, elements: Array, touched: Array) -> None:
        """Report elements that another program touched before."""
        before = touched[elements]
        hit = (before >= 0) & (before != self._program)
        self._report("race", region, elements[hit], before[hit])

    def _report(
        self,
        kind: Literal["race", "twice", "unordered"],
        region: _Region,
        elements: Array,
        before: Array | None = None,
    ) -> None:
        conflicts = self.launches[-1].conflicts
        if not elements.size or len(conflicts) >= _SHOWN:
            return
        earlier = self._program if before is None else int(before[0])
        conflicts.append(
            Conflict(
                kind=kind,
                argument=region.name,
                element=int(elements[0]),
                programs=(earlier, self._program),
            )
        )


def _regions(arguments: Mapping[str, Any]) -> list[_Region]:
    """The memory of all tensors, in order of address; what overlaps is one region."""
    tensors = {k: t for k, t in arguments.items() if isinstance(t, torch.Tensor) and t.numel()}
    spans: list[tuple[int, int, int, str]] = []
    for name, tensor in sorted(tensors.items(), key=lambda item: item[1].data_ptr()):
        reach = sum((d - 1) * s for d, s in zip(tensor.shape, tensor.stride(), strict=True)) + 1
        start, itemsize = tensor.data_ptr(), tensor.element_size()
        stop = start + reach * itemsize
        if spans and start < spans[-1][1]:
            first, last, size, other = spans.pop()
            assert size == itemsize, f"{other!r} and {name!r} overlap and have different elements"
            spans.append((first, max(last, stop), size, f"{other}|{name}"))
        else:
            spans.append((start, stop, itemsize, name))
    return [_Region(name, start, stop, size) for start, stop, size, name in spans]
