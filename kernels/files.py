"""Copies of values in memory-mapped files, where the host's memory has no room for them.

What a file holds passes through pinned memory, and a thread for each direction moves it between
the two beside the step. Two blocks at a time are on their way to files: a third waits, so that
pinned memory does not fill up where the disk is slower than the plan's number.

Source: activations on an SSD, Wu et al. (2024), "SSDTrain: An Activation Offloading Framework to
SSDs for Faster Large Language Model Training", arXiv:2408.10013.
"""

import functools
import time
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor

from memopt.kernels.arena import Arena
from memopt.kernels.copies import copied_back, copied_out, pinned_like

_ON_THEIR_WAY = 2


class Files:
    """Values in files of one directory.

    Args:
        directory: of the files.

    Attributes:
        arena: the files.
    """

    def __init__(self, directory: str) -> None:
        self.arena = Arena(directory)
        self._writer, self._reader = ThreadPoolExecutor(1), ThreadPoolExecutor(1)
        self._on_their_way: deque[Future[None]] = deque()
        self._written: dict[int, Future[None]] = {}  # by the address that a file is mapped to

    def put(self, x: Tensor) -> tuple[Tensor, torch.cuda.Event]:
        """A mapped copy of a value on a GPU, and when the value may be written over."""
        kept = self.arena.empty_like(x)
        if len(self._on_their_way) == _ON_THEIR_WAY:
            self._on_their_way.popleft().result()
        block, left = copied_out(x)
        written = self._writer.submit(_write, kept, block, left)
        self._on_their_way.append(written)
        self._written[kept.data_ptr()] = written
        return kept, left

    def take(self, kept: Tensor, x: Tensor, free: torch.cuda.Event) -> "Future[torch.cuda.Event]":
        """Copy a mapped value into ``x`` on a GPU; the event says when it is there.

        Args:
            kept: what ``put`` returned.
            x: where to.
            free: when the memory of ``x`` is no longer in use.
        """
        return self._reader.submit(_read, kept, x, self._written[kept.data_ptr()], free)


@functools.cache
def files_in(directory: str) -> Files:
    """The values in files of a directory; the same for all models."""
    return Files(directory)


@torch.no_grad()
def _write(kept: Tensor, block: Tensor, left: torch.cuda.Event) -> None:
    left.synchronize()
    kept.copy_(block)


@torch.no_grad()
def _read(
    kept: Tensor, x: Tensor, written: "Future[None]", free: torch.cuda.Event
) -> torch.cuda.Event:
    written.result()
    block = pinned_like(kept)
    block.copy_(kept)
    return copied_back(block, x, free)


def file_bandwidth(directory: str, nbytes: int = 2**28) -> float:
    """Bytes per second that a directory's disk writes, by one file of ``nbytes``."""
    arena = Arena(directory)
    memory = arena.mapped(nbytes)
    start = time.perf_counter()
    memory.write(bytes(nbytes))
    memory.flush()
    return nbytes / (time.perf_counter() - start)
