"""Seconds and scratch bytes of each node: a roofline by device table, or measured."""

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx
from torch.utils.flop_counter import flop_registry

from memopt._torch import OpOverload, disable_modes, pytree, size_hint
from memopt.device import DeviceSpec
from memopt.graph import OpKind, op_kind, packet_name, tensors
from memopt.kernels.band_tiles import seen_scores
from memopt.memory.workspace import workspace_bytes

# Vector operations that cost this many times an addition, on a device without spare arithmetic.
_SLOW_ELEMENTWISE = frozenset(
    "exp expm1 log log1p log2 log10 tanh sigmoid erf erfc erfinv sin cos tan pow sqrt rsqrt "
    "gelu gelu_backward silu silu_backward softplus native_dropout rand_like "
    "tanh_backward sigmoid_backward reciprocal div".split()
)
_SLOW_FACTOR = 4.0
# A number of a counter-based generator (Philox, ten rounds). Inductor's CPU code draws them one by
# one, 10 ns each where an exponential takes 0.4; a GPU draws them in all its lanes.
_RANDOM_FACTOR = {"cpu": 75.0}
_OTHER_RANDOM_FACTOR = 12.0
# Copies run beside the step: see ``memopt.memory.transfers``.
_BESIDE = frozenset({"memopt.to_host", "memopt.from_host"})
_LIBRARY_EFFICIENCY = 0.7  # of the roofline, typical of large library calls
# Attention reaches less of the peak; the CPU's least: softmax between two small matrix products.
_ATTENTION_EFFICIENCY = {"cpu": 0.12}
_OTHER_ATTENTION_EFFICIENCY = 0.4


@dataclass(frozen=True)
class CostModel:
    """Prices nodes for one device.

    A pointwise node in a fusing lowering costs its arithmetic alone, since its reads and writes
    belong to the kernel that absorbs it. Everything else costs
    ``max(flops / peak, bytes / bandwidth) / efficiency + launch``.

    Attributes:
        device: the numbers.
        fused: whether the lowering fuses loops.
        measured: whether to time library calls on this machine instead (median of three).
    """

    device: DeviceSpec
    fused: bool
    measured: bool = False
    _timed: dict[Any, float] = field(default_factory=dict, repr=False, compare=False)

    def seconds(self, node: fx.Node) -> float:
        """Modelled time of running the node once."""
        kind = op_kind(node)
        if kind in (OpKind.INPUT, OpKind.VIEW, OpKind.SYMBOL):
            return 0.0
        if packet_name(node.target) in _BESIDE:
            return self.device.launch_seconds
        if kind is OpKind.EXTERN and self.measured:
            return self._measure(node)
        touched = [t for n in (node, *node.all_input_nodes) for t in _values(n)]
        if kind is OpKind.EXTERN:
            seconds = self._roofline(flops(node), sum(map(_nbytes, touched)), _dtype(node))
            if "attention" in packet_name(node.target):
                reached = _ATTENTION_EFFICIENCY.get(self.device.name, _OTHER_ATTENTION_EFFICIENCY)
                seconds *= _LIBRARY_EFFICIENCY / reached
            return seconds + self.device.launch_seconds
        name = packet_name(node.target).rpartition(".")[2]
        factor = _SLOW_FACTOR if name in _SLOW_ELEMENTWISE else 1.0
        if name == "inductor_random":
            factor = _RANDOM_FACTOR.get(self.device.name, _OTHER_RANDOM_FACTOR)
        elements = max((size_hint(t.numel()) for t in touched), default=0)
        arithmetic = 8.0 * factor * elements / self.device.flops_for("float32")
        if self.fused:
            return arithmetic
        moved = sum(map(_nbytes, touched))
        return max(arithmetic, moved / self.device.bandwidth) + self.device.launch_seconds

    def traffic_seconds(self, nbytes: int) -> float:
        """Time to write and read back that many bytes."""
        return 2.0 * nbytes / self.device.bandwidth

    def workspace_bytes(self, node: fx.Node) -> int:
        """Scratch that the node's kernel allocates and frees while it runs."""
        kind = op_kind(node)
        if kind in (OpKind.INPUT, OpKind.VIEW, OpKind.SYMBOL):
            return 0
        if self.fused and kind is not OpKind.EXTERN:
            return 0
        args, kwargs = pytree.tree_map_only(
            fx.Node, lambda n: n.meta.get("val"), (node.args, node.kwargs)
        )
        return workspace_bytes(node.target, args, kwargs, node.meta.get("val"))

    def _roofline(self, flops: float, moved: int, dtype: str) -> float:
        bound = max(flops / self.device.flops_for(dtype), moved / self.device.bandwidth)
        return bound / _LIBRARY_EFFICIENCY

    def _measure(self, node: fx.Node) -> float:
        key = (str(node.target), _signature(node))
        if key not in self._timed:
            self._timed[key] = _time(node)
        return self._timed[key]


def _values(node: fx.Node) -> Sequence[torch.Tensor]:
    return tensors(node.meta.get("val"))


def _nbytes(tensor: torch.Tensor) -> int:
    return size_hint(tensor.numel()) * tensor.element_size()


def _dtype(node: fx.Node) -> str:
    values = _values(node) or [t for n in node.all_input_nodes for t in _values(n)]
    return str(values[0].dtype).removeprefix("torch.") if values else "float32"


def flops(node: fx.Node) -> float:
    """Floating-point operations, by torch's own registry; of a loop one for each entry."""
    target = node.target
    if not isinstance(target, OpOverload):
        return 0.0
    formula = flop_registry.get(target.overloadpacket)
    name = packet_name(target)
    if formula is None and name in _ATTENTION_PRODUCTS:
        arguments = node.args[_ATTENTION_AT[name] :][:2]
        query, key = (_values(n)[0] for n in arguments if isinstance(n, fx.Node))
        batch, heads, rows, width = (size_hint(d) for d in query.shape)
        columns = size_hint(key.shape[2])
        return _ATTENTION_PRODUCTS[name] * 2.0 * batch * heads * rows * columns * width
    if formula is None and name in _BANDED_PRODUCTS:
        return _banded_flops(node, name)
    if formula is None:
        return float(sum(size_hint(t.numel()) for t in _values(node)))
    args, kwargs = pytree.tree_map_only(
        fx.Node, lambda n: _with_hints(n.meta.get("val")), (node.args, node.kwargs)
    )
    value = pytree.tree_map(_with_hints, node.meta.get("val"))
    return float(formula(*args, **kwargs, out_val=value))


# Matrix products in the CPU's attention, which torch's registry does not list: two forward; one to
# recompute the scores and four for the gradients backward. The query is the nth tensor argument.
_ATTENTION_PRODUCTS = {
    "aten._scaled_dot_product_flash_attention_for_cpu": 2,
    "aten._scaled_dot_product_flash_attention_for_cpu_backward": 5,
}
_ATTENTION_AT = {
    "aten._scaled_dot_product_flash_attention_for_cpu": 0,
    "aten._scaled_dot_product_flash_attention_for_cpu_backward": 1,
}


# Products of each score that is seen: as long as a key, and as long as a value.
_BANDED_PRODUCTS = {
    "memopt.banded_attention": (1, 1),
    "memopt.banded_attention_backward": (3, 2),
}


def _banded_flops(node: fx.Node, name: str) -> float:
    """Of scores that are seen alone."""
    args = pytree.tree_map_only(fx.Node, lambda n: n.meta.get("val"), node.args)
    q, k, v, *_ = args[name.endswith("_backward") :]
    spans, sinks = args[-3:-1]
    by_key, by_value = _BANDED_PRODUCTS[name]
    terms = by_key * size_hint(q.shape[3]) + by_value * size_hint(v.shape[3])
    return 2.0 * seen_scores(q, k, spans, sinks) * terms


def _with_hints(value: Any) -> Any:
    """A fake tensor with symbolic sizes as one with the sizes that tracing saw."""
    if isinstance(value, torch.Tensor) and any(isinstance(d, torch.SymInt) for d in value.shape):
        return torch.empty([size_hint(d) for d in value.shape], dtype=value.dtype, device="meta")
    return size_hint(value) if isinstance(value, torch.SymInt) else value


def _signature(node: fx.Node) -> Any:
    shapes = tuple(
        (tuple(size_hint(d) for d in t.shape), str(t.dtype))
        for n in node.all_input_nodes
        for t in _values(n)
    )
    rest = [a for a in pytree.tree_leaves((node.args, node.kwargs)) if not isinstance(a, fx.Node)]
    return shapes, repr(rest)


def _time(node: fx.Node) -> float:
    """Median seconds of three runs on zeros of the traced shapes."""

    def real(n: fx.Node) -> Any:
        return pytree.tree_map_only(torch.Tensor, _zeros, n.meta.get("val"))

    cuda = any(t.is_cuda for n in node.all_input_nodes for t in _values(n))
    runs = []
    with disable_modes(), torch.no_grad():
        args, kwargs = pytree.tree_map_only(fx.Node, real, (node.args, node.kwargs))
        for _ in range(4):
            start = time.perf_counter()
            node.target(*args, **kwargs)  # type: ignore[operator]
            if cuda:
                torch.cuda.synchronize()
            runs.append(time.perf_counter() - start)
    return statistics.median(runs[1:])


def _zeros(fake: torch.Tensor) -> torch.Tensor:
    shape = [size_hint(d) for d in fake.shape]
    stride = [size_hint(d) for d in fake.stride()]
    return torch.empty_strided(shape, stride, dtype=fake.dtype, device=fake.device).zero_()
