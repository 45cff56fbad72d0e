"""Hold a value as codes of 8 or 4 bits, whole or floating, with a scale for each group of a row.

The backward reads numbers that are off by half a step of their group at most. So the form is used
only where the options name it, within a bound on the error of the gradient, and never for what
must be consistent with the forward: statistics of norms and of softmax, what attention reads, and
anything that is drawn. From such a value loops may be run again, and nothing else.

Pays: half of bfloat16's bytes, or a quarter, of any large value. Does not: where the gradient must
be exact. ``explain`` measures the gradient's error on the inputs it is given.

Sources: groups of a row with scales of their own are ActNN's: Chen et al. (2021),
arXiv:2104.14129; what may be held so and what may not, GACT's: Liu et al. (2022),
arXiv:2206.11357.
"""

import math
import operator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from memopt.device import DeviceSpec
from memopt.errors import ConfigError
from memopt.graph import OpKind, is_random, is_view, op_kind, packet_name
from memopt.kernels.compressed import COMPRESS, DECOMPRESS, check, is_symmetric
from memopt.passes.joint_nodes import call


@dataclass(frozen=True)
class Compress:
    """``x (..., H)`` -> ``uint8 (n,)``.

    Attributes:
        bits: of a code, 8 or 4.
        floats: whether codes of 8 bits float, for groups whose numbers differ by orders of
            magnitude; the error of others is larger.
        group: entries that share a scale, a power of two from 16 to 1024.
        error: bound on the gradient's error, over its norm. A plan holds as many values so as
            keep within it if their roundings are independent, and their numbers normal; what a
            model's inputs make of it, ``memopt.explain`` measures.
        least: bytes of a value that is worth it.

    Raises:
        ConfigError: for other bits, groups and bounds.
    """

    name: ClassVar[str] = "compress"
    kind: ClassVar[str] = "compress"
    default: ClassVar[bool] = False
    bits: int = 8
    floats: bool = False
    group: int = 128
    error: float = 0.05
    least: int = 2**18

    def __post_init__(self) -> None:
        check(1, self.bits, self.group, self.floats)
        if not isinstance(self.error, int | float) or not 0 < self.error <= 1:
            raise ConfigError(
                f"option 'error' of pass 'compress' = {self.error!r}: allowed is a number above 0 "
                f"and up to 1, such as 0.05"
            )

    @property
    def loss(self) -> float:
        """Error of one value over its norm, if its numbers are normal.

        A group's largest is about ``sqrt(2 ln 2g)`` deviations; rounding takes, on average, a
        step over the root of 12. A floating code's step is an eighth of a power of two, and the
        square of a mantissa is ``3 / (2 ln 2)`` on average.
        """
        if self.floats:
            return math.sqrt(2 * math.log(2) / 3) / 8 / math.sqrt(12)
        largest = math.sqrt(2 * math.log(2 * self.group))
        symmetric = is_symmetric(self.bits)
        steps = 2 ** (self.bits - 1) - 1 if symmetric else (2**self.bits - 1) / 2
        return float(largest / steps / math.sqrt(12))

    def fits(self, node: fx.Node, device: DeviceSpec) -> str | None:
        """As ``Form.fits``."""
        value = node.meta.get("val")
        if not isinstance(value, torch.Tensor) or not value.dtype.is_floating_point:
            return None
        if not all(isinstance(n, int) for n in value.shape):
            return "a value whose size changes is not held in fewer bits"
        if value.nbytes < self.least or not value.dim() or value.shape[-1] < self.group:
            return None
        if is_view(node) and not _is_first_result(node):
            return None
        if not value.is_contiguous():
            return "a value that is not contiguous is not held in fewer bits"
        if is_random(node) or _is_statistic(node) or any(map(_is_strict, _readers(node))):
            return None
        return ""

    def encode(self, graph: fx.Graph, value: fx.Node) -> fx.Node:
        """As ``Form.encode``."""
        return call(graph, COMPRESS, value, self.bits, self.group, self.floats, like=value)

    def decode(self, graph: fx.Graph, encoded: fx.Node, like: fx.Node) -> fx.Node:
        """As ``Form.decode``."""
        value = like.meta["val"]
        form = [*value.shape], value.dtype, self.bits, self.group, self.floats
        return call(graph, DECOMPRESS, encoded, *form, like=like)


def _is_first_result(node: fx.Node) -> bool:
    """Of several: the others of a library call are statistics, masks and the state of a draw."""
    return node.target is operator.getitem and bool(node.args[1] == 0)


def _is_statistic(node: fx.Node) -> bool:
    """A sum over rows, or what must agree with one that the forward has taken."""
    return op_kind(node) is OpKind.REDUCTION or _is_strict(node)


def _is_strict(node: fx.Node) -> bool:
    """Whether the operator, or the one it is a result of, is of a softmax or an attention."""
    maker: Any = node.args[0] if node.target is operator.getitem else node
    name = packet_name(maker.target)
    return "softmax" in name or "attention" in name or "cross_entropy" in name


def _readers(node: fx.Node) -> list[fx.Node]:
    """What reads the value or a view of it, forward and backward."""
    found = []
    for user in node.users:
        found += _readers(user) if user.op == "call_function" and is_view(user) else [user]
    return found
