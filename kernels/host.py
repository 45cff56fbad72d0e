"""Copies of values in the host's memory, while the device has others in their place.

On a GPU copies run on streams of their own, one for each direction, beside the step's. ``to_host``
and ``from_host`` start one where they stand; ``left_`` and ``arrived_`` have the step wait for its
end. A graph holds what is copied until it has left, so nothing is written over it before. The
host's memory is pinned, and is torch's caching allocator's: a step takes the blocks that the last
one has given back.

On the CPU, which has one memory, the host's is simulated: copies lie outside torch's allocator
and are counted, so that plans and graphs are the same as on a GPU, and so are the bytes.

Pays: the bytes of what is copied, for no time where the link keeps up with the step.

Source: keeping activations on the host is vDNN's: Rhu et al. (2016), "vDNN: Virtualized Deep
Neural Networks for Scalable, Memory-Efficient Neural Network Design", arXiv:1602.08124.
"""

import functools
import mmap
import weakref

import torch
from torch import Tensor

from memopt.errors import HostMemoryError
from memopt.kernels.measured import best_seconds
from memopt.units import format_bytes

_APART = (torch.Tag.cudagraph_unsafe,)  # streams and events of their own

torch.library.define("memopt::to_host", "(Tensor x) -> Tensor", tags=_APART)
torch.library.define("memopt::left_", "(Tensor(a!) x) -> ()", tags=_APART)
torch.library.define("memopt::from_host", "(Tensor kept, Device device) -> Tensor", tags=_APART)
torch.library.define("memopt::arrived_", "(Tensor(a!) x) -> ()", tags=_APART)
TO_HOST = torch.ops.memopt.to_host.default
LEFT = torch.ops.memopt.left_.default
FROM_HOST = torch.ops.memopt.from_host.default
ARRIVED = torch.ops.memopt.arrived_.default


class Arena:
    """Memory that stands in for the host's on a machine without a GPU.

    Attributes:
        held_bytes: of the copies that are alive.
        peak_bytes: the most that they have been.
    """

    def __init__(self) -> None:
        self.held_bytes = self.peak_bytes = 0

    def empty_like(self, x: Tensor) -> Tensor:
        """A tensor of the same shape, strides and dtype, outside torch's allocator."""
        nbytes = max(1, x.untyped_storage().nbytes())
        memory = mmap.mmap(-1, nbytes)
        flat = torch.frombuffer(memory, dtype=torch.uint8)
        self.held_bytes += nbytes
        self.peak_bytes = max(self.peak_bytes, self.held_bytes)
        weakref.finalize(flat.untyped_storage(), self._release, nbytes).atexit = False
        return flat.view(x.dtype).as_strided(x.shape, x.stride())

    def _release(self, nbytes: int) -> None:
        self.held_bytes -= nbytes


ARENA = Arena()
_ends: dict[int, torch.cuda.Event] = {}  # of copies on their way, by the address on the device


@functools.cache
def _stream(device: torch.device, direction: str) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


@torch.library.impl("memopt::to_host", "default")
def _to_host(x: Tensor) -> Tensor:
    """A copy on the host, still to be written when this returns.

    Args:
        x: on a GPU or on the CPU, without gaps.

    Raises:
        HostMemoryError: the host has no more memory to pin.
    """
    if x.device.type == "cpu":
        return ARENA.empty_like(x).copy_(x)
    kept = _pinned_like(x)
    stream = _stream(x.device, "to the host")
    stream.wait_stream(torch.cuda.current_stream(x.device))
    with torch.cuda.stream(stream):
        kept.copy_(x, non_blocking=True)
    _ends[x.data_ptr()] = stream.record_event()
    return kept


def _pinned_like(x: Tensor) -> Tensor:
    try:
        return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, pin_memory=True)
    except RuntimeError as error:
        raise HostMemoryError(
            f"the host has no {format_bytes(x.nbytes)} more to pin ({error}): allow less with "
            f"options={{'passes': {{'offload': {{'host_bytes': ...}}}}}}, or switch it off"
        ) from error


@torch.library.impl("memopt::from_host", "default")
def _from_host(kept: Tensor, device: torch.device) -> Tensor:
    """A copy on a device, still to be written when this returns; see ``arrived_``.

    Args:
        kept: what ``to_host`` returned.
        device: where to.
    """
    if device.type == "cpu":
        return torch.empty_strided(kept.shape, kept.stride(), dtype=kept.dtype).copy_(kept)
    x = torch.empty_strided(kept.shape, kept.stride(), dtype=kept.dtype, device=device)
    stream = _stream(x.device, "from the host")
    stream.wait_stream(torch.cuda.current_stream(x.device))  # its memory may be in use until then
    with torch.cuda.stream(stream):
        x.copy_(kept, non_blocking=True)
    _ends[x.data_ptr()] = stream.record_event()
    return x


def _wait(x: Tensor) -> None:
    """Have the step wait until the copy of a value, or into it, has ended."""
    if event := _ends.pop(x.data_ptr(), None):
        torch.cuda.current_stream(x.device).wait_event(event)


torch.library.impl("memopt::left_", "default", _wait)
torch.library.impl("memopt::arrived_", "default", _wait)


def _fake_to_host(x: Tensor) -> Tensor:
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype)


def _fake_from_host(kept: Tensor, device: torch.device) -> Tensor:
    return torch.empty_strided(kept.shape, kept.stride(), dtype=kept.dtype, device=device)


def _fake_wait(x: Tensor) -> None:
    """Nothing is made."""


torch.library.register_fake("memopt::to_host", _fake_to_host)
torch.library.register_fake("memopt::from_host", _fake_from_host)
torch.library.register_fake("memopt::left_", _fake_wait)
torch.library.register_fake("memopt::arrived_", _fake_wait)


def link_bandwidth(device: torch.device, nbytes: int = 2**26) -> float:
    """Bytes per second from a GPU to the host's pinned memory, by the best of a few copies."""
    x = torch.empty(nbytes, dtype=torch.uint8, device=device)
    kept = _pinned_like(x)
    return nbytes / best_seconds(lambda: kept.copy_(x, non_blocking=True), device)
