"""Copies of values in the host's memory, while the device has others in their place.

On a GPU copies run on streams of their own, one for each direction, beside the step's. ``to_host``
and ``from_host`` start one where they stand; ``left_`` and ``arrived_`` have the step wait for its
end. A graph holds what is copied until it has left, so nothing is written over it before. The
host's memory is pinned, and is torch's caching allocator's: a step takes the blocks that the last
one has given back.

On the CPU, which has one memory, the host's is simulated: copies lie outside torch's allocator
and are counted, so that plans and graphs are the same as on a GPU, and so are the bytes.

Given a directory, copies lie in files there: see `memopt.kernels.files`.

Pays: the bytes of what is copied, for no time where the link keeps up with the step.

Source: keeping activations on the host is vDNN's: Rhu et al. (2016), "vDNN: Virtualized Deep
Neural Networks for Scalable, Memory-Efficient Neural Network Design", arXiv:1602.08124.
"""

from concurrent.futures import Future

import torch
from torch import Tensor

from memopt.kernels.arena import Arena
from memopt.kernels.copies import copied_back, copied_out, pinned_like
from memopt.kernels.files import files_in
from memopt.kernels.measured import best_seconds

_APART = (torch.Tag.cudagraph_unsafe,)  # streams and events of their own

torch.library.define("memopt::to_host", "(Tensor x, str? directory=None) -> Tensor", tags=_APART)
torch.library.define("memopt::left_", "(Tensor(a!) x) -> ()", tags=_APART)
torch.library.define(
    "memopt::from_host",
    "(Tensor kept, Device device, str? directory=None) -> Tensor",
    tags=_APART,
)
torch.library.define("memopt::arrived_", "(Tensor(a!) x) -> ()", tags=_APART)
TO_HOST = torch.ops.memopt.to_host.default
LEFT = torch.ops.memopt.left_.default
FROM_HOST = torch.ops.memopt.from_host.default
ARRIVED = torch.ops.memopt.arrived_.default


ARENA = Arena()
_ends: dict[int, torch.cuda.Event | Future[torch.cuda.Event]] = {}
"""Of copies on their way, by the address on the device."""


@torch.library.impl("memopt::to_host", "default")
def _to_host(x: Tensor, directory: str | None = None) -> Tensor:
    """A copy on the host, still to be written when this returns.

    Args:
        x: on a GPU or on the CPU, without gaps.
        directory: of files that copies lie in; None for the host's memory.

    Raises:
        HostMemoryError: the host has no more memory to pin, or the disk no more room.
    """
    if x.device.type == "cpu":
        return _arena(directory).empty_like(x).copy_(x)
    kept, left = copied_out(x) if directory is None else files_in(directory).put(x)
    _ends[x.data_ptr()] = left
    return kept


def _arena(directory: str | None) -> Arena:
    return ARENA if directory is None else files_in(directory).arena


@torch.library.impl("memopt::from_host", "default")
def _from_host(kept: Tensor, device: torch.device, directory: str | None = None) -> Tensor:
    """A copy on a device, still to be written when this returns; see ``arrived_``.

    Args:
        kept: what ``to_host`` returned.
        device: where to.
        directory: that ``to_host`` was given.
    """
    if device.type == "cpu":
        return torch.empty_strided(kept.shape, kept.stride(), dtype=kept.dtype).copy_(kept)
    x = torch.empty_strided(kept.shape, kept.stride(), dtype=kept.dtype, device=device)
    free = torch.cuda.current_stream(x.device).record_event()  # its memory is in use until then
    _ends[x.data_ptr()] = (
        copied_back(kept, x, free)
        if directory is None
        else files_in(directory).take(kept, x, free)
    )
    return x


def _wait(x: Tensor) -> None:
    """Have the step wait until the copy of a value, or into it, has ended."""
    end = _ends.pop(x.data_ptr(), None)
    if isinstance(end, Future):
        end = end.result()
    if end is not None:
        torch.cuda.current_stream(x.device).wait_event(end)


torch.library.impl("memopt::left_", "default", _wait)
torch.library.impl("memopt::arrived_", "default", _wait)


def _fake_to_host(x: Tensor, directory: str | None = None) -> Tensor:
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype)


def _fake_from_host(kept: Tensor, device: torch.device, directory: str | None = None) -> Tensor:
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
    kept = pinned_like(x)
    return nbytes / best_seconds(lambda: kept.copy_(x, non_blocking=True), device)
