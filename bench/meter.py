"""Exact bytes of a region of code.

On the CPU the meter adds up every allocation and release that PyTorch's profiler reports, in the
order of time: no sampling, and eager and compiled code are read alike. On CUDA it reads the
caching allocator's own counters.
"""

import gc
from collections.abc import Iterable, Iterator
from types import TracebackType

import torch
from torch._C._profiler import _EventType, _ProfilerEvent
from torch.profiler import ProfilerActivity, profile


class Meter:
    """Context manager that measures what a block allocates above what is alive on entry.

    On the CPU a release inside the block of what was allocated before it goes unseen (PyTorch
    does not know the sizes of such blocks), so release gradients before entry.

    Attributes:
        peak_bytes: the highest level reached inside the block.
        end_bytes: the level when the block ended.
        reserved_bytes: the most that CUDA's caching allocator held, in all; None on the CPU,
            whose allocator keeps nothing back.
    """

    peak_bytes: int
    end_bytes: int
    reserved_bytes: int | None

    def __init__(self, device: str | torch.device = "cpu") -> None:
        self._device = torch.device(device)
        self._profile: profile | None = None
        self._base_bytes = 0

    def __enter__(self) -> "Meter":
        gc.collect()
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self._device)
            self._base_bytes = torch.cuda.memory_allocated(self._device)
        else:
            self._profile = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
            self._profile.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._profile is None:
            torch.cuda.synchronize(self._device)
            allocated = torch.cuda.memory_allocated(self._device)
            self.peak_bytes = torch.cuda.max_memory_allocated(self._device) - self._base_bytes
            self.end_bytes = allocated - self._base_bytes
            self.reserved_bytes = torch.cuda.max_memory_reserved(self._device)
            return
        self._profile.stop()
        self.peak_bytes, self.end_bytes = _levels(_allocations(self._profile))
        self.reserved_bytes = None
        self._profile = None


def _levels(allocations: Iterable[tuple[int, int]]) -> tuple[int, int]:
    """Peak and final level of ``(address, signed bytes)`` in the order of time.

    A release counts only if its allocation was seen: the profiler remembers sizes from earlier
    profiles, and such an address may since have been given to something else.
    """
    live: dict[int, int] = {}
    level_bytes = peak_bytes = 0
    for address, nbytes in allocations:
        if nbytes > 0:
            live[address] = nbytes
            level_bytes += nbytes
            peak_bytes = max(peak_bytes, level_bytes)
        else:
            level_bytes -= live.pop(address, 0)
    return peak_bytes, level_bytes


def _allocations(done: profile) -> Iterator[tuple[int, int]]:
    """Address and signed bytes of every CPU allocation and release, in the order of time."""
    assert done.profiler is not None
    results = done.profiler.kineto_results
    assert results is not None
    pending = list(results.experimental_event_tree())
    events: list[_ProfilerEvent] = []
    while pending:
        event = pending.pop()
        pending += event.children
        if event.tag == _EventType.Allocation:
            events.append(event)
    for event in sorted(events, key=lambda event: event.start_time_ns):
        fields = event.extra_fields
        if fields.device.type == "cpu":  # type: ignore[union-attr]
            yield fields.ptr, fields.alloc_size  # type: ignore[union-attr]
