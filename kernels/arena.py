"""Memory outside torch's allocator: anonymous, or that of files in a directory."""

import mmap
import os
import tempfile
import weakref

import torch
from torch import Tensor

from memopt.errors import HostMemoryError
from memopt.units import format_bytes


class Arena:
    """Where copies lie that torch's allocator does not count.

    A file has no name in its directory, so that nothing stays behind however the process ends. Its
    blocks are on the disk before it is mapped, since a full disk would end the process later on.
    The next step takes the files that the last one has given back.

    Args:
        directory: of the files; None for memory that stands in for the host's where there is no
            GPU.

    Attributes:
        held_bytes: of the copies that are alive.
        peak_bytes: the most that they have been.
    """

    def __init__(self, directory: str | None = None) -> None:
        self.directory = directory
        self.held_bytes = self.peak_bytes = 0
        self._free: dict[int, list[mmap.mmap]] = {}

    def empty_like(self, x: Tensor) -> Tensor:
        """A tensor on the CPU of the same shape, strides and dtype.

        Raises:
            HostMemoryError: the directory, or the disk that it is on, takes no such file.
        """
        nbytes = max(1, x.untyped_storage().nbytes())
        free = self._free.get(nbytes)
        memory = free.pop() if free else self.mapped(nbytes)
        flat = torch.frombuffer(memory, dtype=torch.uint8)
        self.held_bytes += nbytes
        self.peak_bytes = max(self.peak_bytes, self.held_bytes)
        weakref.finalize(flat.untyped_storage(), self._release, memory, nbytes).atexit = False
        return flat.view(x.dtype).as_strided(x.shape, x.stride())

    def mapped(self, nbytes: int) -> mmap.mmap:
        """Memory of a new file, or none's.

        Raises:
            HostMemoryError: as ``empty_like``.
        """
        if self.directory is None:
            return mmap.mmap(-1, nbytes)
        try:
            with tempfile.TemporaryFile(dir=self.directory) as file:
                os.posix_fallocate(file.fileno(), 0, nbytes)
                return mmap.mmap(file.fileno(), nbytes)
        except OSError as error:
            raise HostMemoryError(
                f"no file of {format_bytes(nbytes)} more in {self.directory!r} ({error}): allow "
                "less with options={'passes': {'offload_to_files': {'file_bytes': ...}}}, or name "
                "another directory"
            ) from error

    def _release(self, memory: mmap.mmap, nbytes: int) -> None:
        self.held_bytes -= nbytes
        if self.directory is not None:
            self._free.setdefault(nbytes, []).append(memory)
