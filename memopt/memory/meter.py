"""Counts the storages of a replayed step as they come and go, kernel by kernel."""

import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from memopt.memory.timeline import LiveRange, Step, Timeline


@dataclass
class StorageMeter:
    """Counts storages as they come and go; every kernel call is one step."""

    granularity: int
    backward: bool = False
    peak_bytes: int = 0
    total_bytes: int = 0
    live: dict[int, int] = field(default_factory=dict)
    steps: list[Step] = field(default_factory=list)
    ranges: list[LiveRange] = field(default_factory=list)
    _born: dict[int, tuple[str, int]] = field(default_factory=dict)
    _resident: list[Any] = field(default_factory=list)

    def allocate(self, tensor: torch.Tensor, name: str) -> bool:
        """Count a tensor's storage until it dies; False where it is counted already."""
        storage = tensor.untyped_storage()
        key = storage_key(tensor)
        if key in self._born:
            return False
        nbytes = -(-int(storage.nbytes()) // self.granularity) * self.granularity
        self.live[key] = nbytes
        self.total_bytes += nbytes
        self.peak_bytes = max(self.peak_bytes, self.total_bytes)
        self._born[key] = (name, len(self.steps))
        weakref.finalize(storage, self._release, key).atexit = False
        return True

    def step(self, name: str, scratch_bytes: int = 0) -> None:
        """Something ran, with that much scratch."""
        if scratch_bytes:
            self.peak_bytes = max(self.peak_bytes, self.total_bytes + scratch_bytes)
            self._range(f"workspace of {name}", scratch_bytes, len(self.steps), "workspace")
        self.steps.append(Step(name, backward=self.backward))

    def ignore(self, tensors: Sequence[Any]) -> None:
        """These were resident before the step began, and stay: their addresses are not reused."""
        self._resident.extend(tensors)
        for tensor in tensors:
            if isinstance(tensor, torch.Tensor):
                self._born.setdefault(storage_key(tensor), ("resident", -1))

    def close(self) -> Timeline:
        """Close every open life, and give the schedule."""
        for key in list(self.live):
            self._release(key)
        steps = tuple(self.steps) or (Step("nothing runs"),)
        return Timeline("plan", steps, tuple(r for r in self.ranges if r.first < len(steps)))

    def _release(self, key: int) -> None:
        nbytes = self.live.pop(key, None)
        name, first = self._born.pop(key, ("", -1))
        if nbytes is not None:
            self.total_bytes -= nbytes
            self._range(name, nbytes, first, "temporary")

    def _range(self, name: str, nbytes: int, first: int, role: str) -> None:
        last = first if role == "workspace" else max(first, len(self.steps) - 1)
        self.ranges.append(LiveRange(name=name, nbytes=nbytes, first=first, last=last, role=role))


def storage_key(tensor: torch.Tensor) -> int:
    """The address of a tensor's storage: no two that are alive share one."""
    return int(tensor.untyped_storage()._cdata)
