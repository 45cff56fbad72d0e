"""Copies between a GPU and the host's pinned memory, on streams of their own, one each way."""

import functools

import torch
from torch import Tensor

from memopt.errors import HostMemoryError
from memopt.units import format_bytes


def pinned_like(x: Tensor) -> Tensor:
    """A tensor of the same shape, strides and dtype, in memory that copies reach by themselves.

    It is torch's caching allocator's: a step takes the blocks that the last one has given back.

    Raises:
        HostMemoryError: the host has no more memory to pin.
    """
    try:
        return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, pin_memory=True)
    except RuntimeError as error:
        raise HostMemoryError(
            f"the host has no {format_bytes(x.nbytes)} more to pin ({error}): allow less with "
            f"options={{'passes': {{'offload': {{'host_bytes': ...}}}}}}, or switch it off"
        ) from error


def copied_out(x: Tensor) -> tuple[Tensor, torch.cuda.Event]:
    """A pinned copy of what the current stream has in ``x`` by now, and when it is written."""
    kept = pinned_like(x)
    stream = _stream(x.device, "to the host")
    stream.wait_stream(torch.cuda.current_stream(x.device))
    with torch.cuda.stream(stream):
        kept.copy_(x, non_blocking=True)
    return kept, stream.record_event()


def copied_back(kept: Tensor, x: Tensor, free: torch.cuda.Event) -> torch.cuda.Event:
    """Copy pinned memory into ``x``, and say when it is there.

    Args:
        kept: pinned.
        x: on a GPU.
        free: when the memory of ``x`` is no longer in use.
    """
    stream = _stream(x.device, "from the host")
    stream.wait_event(free)
    with torch.cuda.stream(stream):
        x.copy_(kept, non_blocking=True)
    there: torch.cuda.Event = stream.record_event()
    return there


@functools.cache
def _stream(device: torch.device, direction: str) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
