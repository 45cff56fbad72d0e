"""Hold positions in as few bytes as their range needs.

An operator that picks entries returns where they were, eight bytes each: of a row of 256 one byte
says it, and two of a plane of 128 x 256. Under a budget the planner may hold them so.

Pays: up to seven eighths of the indices of a maximum, a sort, the largest k or a pooling, which no
backward can do without. Does not: on indices that are drawn, which are cheaper to draw again.
Exact.

Source: Gist narrows the positions of a pooling to four bits: Jain et al. (2018),
doi:10.1109/ISCA.2018.00070; here it is any operator whose result has a bound.
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

# Operators that return positions in one dimension: which of their results these are, None for the
# only one, and the place of the argument that names the dimension.
_IN_A_ROW = {
    aten.argmax.default: (None, 1),
    aten.argmin.default: (None, 1),
    aten.max.dim: (1, 1),
    aten.min.dim: (1, 1),
    aten.median.dim: (1, 1),
    aten.mode.default: (1, 1),
    aten.kthvalue.default: (1, 2),
    aten.topk.default: (1, 2),
    aten.sort.default: (1, 1),
    aten.sort.stable: (1, 2),
    aten.cummax.default: (1, 1),
    aten.cummin.default: (1, 1),
}
# Operators whose second result is positions in the last dimensions: how many of them.
_IN_A_PLANE = {
    aten.max_pool2d_with_indices.default: 2,
    aten.max_pool3d_with_indices.default: 3,
    aten.adaptive_max_pool2d.default: 2,
    aten.adaptive_max_pool3d.default: 3,
    aten.fractional_max_pool2d.default: 2,
    aten.fractional_max_pool3d.default: 3,
}
_WIDTHS = (torch.uint8, torch.int16, torch.int32)


@dataclass(frozen=True)
class NarrowIntegers:
    """``int64 (n,)`` -> ``uint8``, ``int16`` or ``int32 (n,)``, by what the operator can return.

    Attributes:
        least: entries that are worth it.
    """

    name: ClassVar[str] = "narrow_integers"
    kind: ClassVar[str] = "narrow"
    default: ClassVar[bool] = True
    loss: ClassVar[float] = 0.0
    least: int = 4096

    def fits(self, node: fx.Node, device: DeviceSpec) -> str | None:
        """As ``Form.fits``."""
        value = node.meta.get("val")
        if not isinstance(value, torch.Tensor) or value.dtype != torch.int64:
            return None
        if is_view(node) and node.target is not operator.getitem:
            return None
        known = _entries(node)
        if known is None:
            return None
        if not isinstance(known, int) or not isinstance(value.numel(), int):
            return "positions in a size that changes stay as they are"
        return "" if value.numel() >= self.least and _width(known) else None

    def encode(self, graph: fx.Graph, value: fx.Node) -> fx.Node:
        """As ``Form.encode``."""
        width = _width(_entries(value))
        return call(graph, prims.convert_element_type.default, value, width, like=value)

    def decode(self, graph: fx.Graph, encoded: fx.Node, like: fx.Node) -> fx.Node:
        """As ``Form.decode``."""
        return call(graph, prims.convert_element_type.default, encoded, torch.int64, like=like)


def _width(entries: Any) -> torch.dtype | None:
    """The narrowest type that counts so many entries; None where that is no narrower."""
    return next((d for d in _WIDTHS if entries - 1 <= torch.iinfo(d).max), None)


def _entries(node: fx.Node) -> Any:
    """How many entries a position is one of; None where the value is no positions."""
    maker, result = node, None
    if node.target is operator.getitem:
        maker, result = node.args[0], node.args[1]  # type: ignore[assignment]
    target: Any = maker.target
    if target in _IN_A_PLANE and result == 1:
        return math.prod(_shape(maker)[-_IN_A_PLANE[target] :])
    if target not in _IN_A_ROW:
        return None
    positions, at = _IN_A_ROW[target]
    if positions != result:
        return None
    name = target._schema.arguments[at].name
    given = maker.args[at] if at < len(maker.args) else maker.kwargs.get(name)
    dim = target._schema.arguments[at].default_value if given is None else given
    shape = _shape(maker)
    if dim is None:
        return math.prod(shape)
    return shape[dim] if shape else 1  # type: ignore[index]


def _shape(maker: fx.Node) -> tuple[Any, ...]:
    """Of what entries are picked from."""
    picked: Any = maker.args[0]
    return tuple(picked.meta["val"].shape)
