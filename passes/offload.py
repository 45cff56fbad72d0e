"""Hold a value in the host's memory, or in a file, copied there and back beside the step.

Under a budget the planner may hold any large value so. How many it does depends on how long the
step runs: copies that the link has no time for are waited for, and the planner counts that.

Pays: all bytes of a value on the device, for the time that the link lacks. Does not: on the CPU,
which has one memory; ``simulate`` makes the same plans and graphs there, and lays the copies
outside of what is counted. Files are what they are on any machine. Exact.

Sources: vDNN (Rhu et al. 2016), arXiv:1602.08124, and see `memopt.memory.transfers`; to files,
SSDTrain (Wu et al. 2024), arXiv:2408.10013.
"""

import operator
import os
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from memopt.device import DeviceSpec
from memopt.errors import ConfigError
from memopt.graph import OpKind, is_view, op_kind
from memopt.kernels.host import FROM_HOST, TO_HOST
from memopt.memory.transfers import Link
from memopt.passes.joint_nodes import call

_DISK = 2e9  # bytes per second that a solid-state disk takes for long


@dataclass(frozen=True)
class _Away:
    """A value that lies elsewhere until the backward reads it.

    Raises:
        ConfigError: a number is not above 0.
    """

    default: ClassVar[bool] = False  # so far it has run without a GPU only
    loss: ClassVar[float] = 0.0
    name: ClassVar[str]
    least: int = 2**20
    bandwidth: float | None = None

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value is None or isinstance(value, bool | str):
                continue
            if not (isinstance(value, int | float) and value > 0):
                raise ConfigError(
                    f"option {name!r} of pass {self.name!r} = {value!r}: allowed is a number "
                    "above 0"
                )

    def fits(self, node: fx.Node, device: DeviceSpec) -> str | None:
        """As ``Form.fits``."""
        value = node.meta.get("val")
        if not isinstance(value, torch.Tensor) or not value.dtype.is_floating_point:
            return None
        if is_view(node) and node.target is not operator.getitem:
            return None
        if not all(isinstance(n, int) for n in (*value.shape, *value.stride())):
            return "a value whose size changes is not copied to the host"
        if value.untyped_storage().nbytes() < self.least:
            return None
        # What loops alone make and read is cheaper to make again.
        return "" if op_kind(node) is OpKind.EXTERN or _read_by_library(node) else None


@dataclass(frozen=True)
class Offload(_Away):
    """``x`` on the device -> ``x`` on the host.

    Attributes:
        least: bytes of a value that is worth a copy.
        bandwidth: bytes per second in each direction, such as ``memopt.kernels.host``'s
            ``link_bandwidth`` measures, or None for the device table's.
        host_bytes: that copies may have at a time, or None for what the host has.
        simulate: whether to do so on the CPU.
    """

    name: ClassVar[str] = "offload"
    kind: ClassVar[str] = "offload"
    host_bytes: int | None = None
    simulate: bool = False

    def link(self, device: DeviceSpec) -> Link:
        """The link that plans count on."""
        return Link(self.bandwidth or device.link, self.host_bytes)

    def fits(self, node: fx.Node, device: DeviceSpec) -> str | None:
        """As ``Form.fits``."""
        if device.name == "cpu" and not self.simulate:
            return None
        return super().fits(node, device)

    def encode(self, graph: fx.Graph, value: fx.Node) -> fx.Node:
        """As ``Form.encode``."""
        return call(graph, TO_HOST, value, like=value)

    def decode(self, graph: fx.Graph, encoded: fx.Node, like: fx.Node) -> fx.Node:
        """As ``Form.decode``."""
        device: Any = like.meta["val"].device
        return call(graph, FROM_HOST, encoded, device, like=like)


@dataclass(frozen=True)
class OffloadToFiles(_Away):
    """``x`` on the device -> ``x`` in a file; beside ``offload``, what its host has no room for.

    Attributes:
        least: bytes of a value that is worth a copy.
        bandwidth: bytes per second in each direction, such as ``memopt.kernels.files``'s
            ``file_bandwidth`` measures, or None for a usual solid-state disk's.
        directory: of the files, on a local disk.
        file_bytes: that they may have at a time, or None for what the disk has.
    """

    name: ClassVar[str] = "offload_to_files"
    kind: ClassVar[str] = "file"
    directory: str = ""
    file_bytes: int | None = None

    def link(self, device: DeviceSpec) -> Link:
        """The link that plans count on.

        Raises:
            ConfigError: no directory is named, or there is none of that name.
        """
        if not (isinstance(self.directory, str) and os.path.isdir(self.directory)):
            raise ConfigError(
                f"option 'directory' of pass {self.name!r} = {self.directory!r}: allowed is the "
                "path of a directory on a local disk"
            )
        return Link(self.bandwidth or min(_DISK, device.link), self.file_bytes)

    def encode(self, graph: fx.Graph, value: fx.Node) -> fx.Node:
        """As ``Form.encode``."""
        return call(graph, TO_HOST, value, self.directory, like=value)

    def decode(self, graph: fx.Graph, encoded: fx.Node, like: fx.Node) -> fx.Node:
        """As ``Form.decode``."""
        device: Any = like.meta["val"].device
        return call(graph, FROM_HOST, encoded, device, self.directory, like=like)


def _read_by_library(node: fx.Node) -> bool:
    """Whether something other than a loop reads the value, or a view of it."""
    return any(
        _read_by_library(user) if is_view(user) else op_kind(user) is OpKind.EXTERN
        for user in node.users
    )
