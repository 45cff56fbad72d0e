"""Hold a mask as bits, an eighth of its bytes.

Under a budget the planner may hold every mask that the backward reads as it is, make it again
from what is held anyway, or hold its bits.

Pays: seven eighths of a mask that is held, as of a dropout, whose mask may not be drawn again, or
of a ReLU whose result nothing else holds. Does not: on the CPU, whose compiled loops take longer
to pack an entry than to draw it. Exact.

Source: a ReLU's mask of bits is Gist's: Jain et al. (2018), "Gist: efficient data encoding for
deep neural network training", doi:10.1109/ISCA.2018.00070.
"""

import math
import operator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from memopt.device import DeviceSpec
from memopt.graph import aten, is_view, prims
from memopt.passes.joint_nodes import call


@dataclass(frozen=True)
class PackMasks:
    """``bool (n,)`` -> ``uint8 (n / 8,)``: entry ``i`` is bit ``i % 8`` of byte ``i // 8``.

    Attributes:
        least: entries of a mask that is worth it.
        cpu: whether to do so on the CPU as well, where packing takes tens of nanoseconds an entry.
    """

    name: ClassVar[str] = "pack_masks"
    kind: ClassVar[str] = "pack"
    default: ClassVar[bool] = True
    loss: ClassVar[float] = 0.0
    least: int = 4096
    cpu: bool = False

    def fits(self, node: fx.Node, device: DeviceSpec) -> str | None:
        """As ``Form.fits``."""
        value = node.meta.get("val")
        if not isinstance(value, torch.Tensor) or value.dtype != torch.bool:
            return None
        if is_view(node) and node.target is not operator.getitem:
            return None
        if device.name == "cpu" and not self.cpu:
            return None
        if not all(isinstance(n, int) for n in (*value.shape, *value.stride())):
            return "a mask whose size changes stays as it is"
        if value.numel() < self.least:
            return None
        dense = value.permute(_memory_order(value)).is_contiguous()
        return "" if dense else "a mask with gaps stays as it is"

    def encode(self, graph: fx.Graph, value: fx.Node) -> fx.Node:
        """As ``Form.encode``."""
        mask = value.meta["val"]
        entries, more = mask.numel(), -mask.numel() % 8

        def put(target: Any, *args: Any, **kwargs: Any) -> fx.Node:
            return call(graph, target, *args, like=value, **kwargs)

        ordered = put(aten.permute.default, value, _memory_order(mask))
        flags = put(aten.reshape.default, ordered, [entries])
        numbers = put(prims.convert_element_type.default, flags, torch.uint8)
        if more:
            numbers = put(aten.constant_pad_nd.default, numbers, [0, more])
        rows = put(aten.reshape.default, numbers, [(entries + more) // 8, 8])
        shifted = put(aten.bitwise_left_shift.Tensor, rows, _places(graph, value))
        return put(aten.sum.dim_IntList, shifted, [1], dtype=torch.uint8)

    def decode(self, graph: fx.Graph, encoded: fx.Node, like: fx.Node) -> fx.Node:
        """As ``Form.decode``."""
        mask = like.meta["val"]
        order = _memory_order(mask)
        shape = [mask.shape[d] for d in order]
        back = [order.index(d) for d in range(len(order))]

        def put(target: Any, *args: Any) -> fx.Node:
            return call(graph, target, *args, like=like)

        column = put(aten.unsqueeze.default, encoded, 1)
        shifted = put(aten.bitwise_right_shift.Tensor, column, _places(graph, like))
        each = put(aten.bitwise_and.Scalar, shifted, 1)
        flags = put(prims.convert_element_type.default, each, torch.bool)
        flat = put(aten.reshape.default, flags, [8 * encoded.meta["val"].numel()])
        if flat.meta["val"].numel() > math.prod(shape):
            flat = put(aten.slice.Tensor, flat, 0, 0, math.prod(shape))
        return put(aten.permute.default, put(aten.reshape.default, flat, shape), back)


def _memory_order(value: torch.Tensor) -> list[int]:
    """Its dimensions from the outermost in memory to the innermost."""
    return sorted(
        range(value.dim()), key=lambda d: (value.stride()[d], value.shape[d]), reverse=True
    )


def _places(graph: fx.Graph, like: fx.Node) -> fx.Node:
    """``[0 ... 7]``."""
    device = like.meta["val"].device
    options = {"start": 0, "step": 1, "dtype": torch.uint8, "requires_grad": False}
    return call(graph, prims.iota.default, 8, like=like, device=device, **options)
