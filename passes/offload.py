"""Hold a value in the host's memory, copied there and back beside the step.

Under a budget the planner may hold any large value so. How many it does depends on how long the
step runs: copies that the link has no time for are waited for, and the planner counts that.

Pays: all bytes of a value on the device, for the time that the link lacks. Does not: on the CPU,
which has one memory; ``simulate`` makes the same plans and graphs there, and lays the copies
outside of what is counted. Exact.

Source: vDNN (Rhu et al. 2016), arXiv:1602.08124; see `memopt.transfers`.
"""

import operator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from memopt.device import DeviceSpec
from memopt.errors import ConfigError
from memopt.graph import OpKind, is_view, op_kind
from memopt.kernels.host import FROM_HOST, TO_HOST
from memopt.passes.joint_nodes import call
from memopt.transfers import Link


@dataclass(frozen=True)
class Offload:
    """``x`` on the device -> ``x`` on the host.

    Attributes:
        least: bytes of a value that is worth a copy.
        host_bytes: that copies may have at a time, or None for what the host has.
        bandwidth: bytes per second in each direction, such as ``memopt.kernels.host``'s
            ``link_bandwidth`` measures, or None for the device table's.
        simulate: whether to do so on the CPU.

    Raises:
        ConfigError: a number is not above 0.
    """

    name: ClassVar[str] = "offload"
    kind: ClassVar[str] = "offload"
    default: ClassVar[bool] = False  # so far it has run in simulation only
    loss: ClassVar[float] = 0.0
    least: int = 2**20
    host_bytes: int | None = None
    bandwidth: float | None = None
    simulate: bool = False

    def __post_init__(self) -> None:
        for name in ("least", "host_bytes", "bandwidth"):
            value = getattr(self, name)
            if value is not None and not (isinstance(value, int | float) and value > 0):
                raise ConfigError(
                    f"option {name!r} of pass 'offload' = {value!r}: allowed is a number above 0"
                )

    def link(self, device: DeviceSpec) -> Link:
        """The link that plans count on."""
        return Link(self.bandwidth or device.link, self.host_bytes)

    def fits(self, node: fx.Node, device: DeviceSpec) -> str | None:
        """As ``Form.fits``."""
        value = node.meta.get("val")
        if not isinstance(value, torch.Tensor) or not value.dtype.is_floating_point:
            return None
        if is_view(node) and node.target is not operator.getitem:
            return None
        if device.name == "cpu" and not self.simulate:
            return None
        if not all(isinstance(n, int) for n in (*value.shape, *value.stride())):
            return "a value whose size changes is not copied to the host"
        if value.untyped_storage().nbytes() < self.least:
            return None
        # What loops alone make and read is cheaper to make again.
        return "" if op_kind(node) is OpKind.EXTERN or _read_by_library(node) else None

    def encode(self, graph: fx.Graph, value: fx.Node) -> fx.Node:
        """As ``Form.encode``."""
        return call(graph, TO_HOST, value, like=value)

    def decode(self, graph: fx.Graph, encoded: fx.Node, like: fx.Node) -> fx.Node:
        """As ``Form.decode``."""
        device: Any = like.meta["val"].device
        return call(graph, FROM_HOST, encoded, device, like=like)


def _read_by_library(node: fx.Node) -> bool:
    """Whether something other than a loop reads the value, or a view of it."""
    return any(
        _read_by_library(user) if is_view(user) else op_kind(user) is OpKind.EXTERN
        for user in node.users
    )
