"""What one node of a Dynamo graph does to a tensor: casts it, scales it, transposes it."""

import math
import operator
from collections.abc import Callable, Mapping
from inspect import signature
from types import FunctionType
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

from memopt._torch import DTensor, OpOverload
from memopt.emit import traced

PLAIN = frozenset({"contiguous", "clone"})
SUMS = frozenset({operator.add, operator.iadd, torch.add, "add", "add_"})
TRANSPOSES = frozenset({torch.transpose, "transpose", torch.swapaxes, "swapaxes", "mT"})
FACTORS: Mapping[Any, Callable[[float], float]] = {
    target: function
    for targets, function in (
        ((operator.mul, operator.imul, torch.mul, "mul", "mul_"), lambda c: c),
        (
            (operator.truediv, operator.itruediv, torch.div, torch.true_divide, "div", "div_"),
            lambda c: 1 / c if c else math.inf,
        ),
    )
    for target in targets
}
_CASTS = frozenset({"float", "half", "bfloat16", "double", "to", "type", "type_as"})
_WRITERS = frozenset(
    {"setitem", "triton_kernel_wrapper_mutation", "iadd", "isub", "imul", "itruediv", "ifloordiv"}
    | {"imod", "ipow", "imatmul", "iand", "ior", "ixor", "ilshift", "irshift"}
)
# What writes without saying so, in its name or schema; instance norm calls it use_input_stats.
_NORMS: Mapping[Any, str] = {
    F.batch_norm: "input running_mean running_var weight bias training",
    F.instance_norm: "input running_mean running_var weight bias training",
    torch.batch_norm: "input weight bias running_mean running_var training",
    torch.instance_norm: "input weight bias running_mean running_var training",
}
_GATHERS = frozenset({"redistribute", "to_local", "full_tensor"})
_FLOATS = frozenset({torch.float16, torch.bfloat16, torch.float32, torch.float64})


def cast_of(node: fx.Node) -> fx.Node | None:
    """What a node converts to another of the usual floating-point dtypes, on the same device.

    An 8-bit float keeps two or three bits of the fraction. That is a quantisation, which a
    model means to have, and no cast.
    """
    source = node.args[0] if node.target in _CASTS and node.args else None
    if not isinstance(source, fx.Node):
        return None
    before, after = traced(source), traced(node)
    tensors = isinstance(before, torch.Tensor) and isinstance(after, torch.Tensor)
    return source if tensors and _alike(before, after) else None


def _alike(before: torch.Tensor, after: torch.Tensor) -> bool:
    return before.device == after.device and {before.dtype, after.dtype} <= _FLOATS


def gathers(node: fx.Node) -> bool:
    """Whether a node only changes which ranks have what of a distributed tensor.

    Behind it either every rank has all of the tensor, or the last dimension is cut.
    """
    source = traced(node.all_input_nodes[0]) if node.target in _GATHERS else None
    if not isinstance(source, DTensor) or node.kwargs.keys() - {"placements", "async_op"}:
        return False
    after = traced(node)
    if not isinstance(after, DTensor):
        whole = node.target == "full_tensor" or all(p.is_replicate() for p in source.placements)
        return whole and len(node.args) == 1
    alike = after.device_mesh == source.device_mesh and after.dtype == source.dtype
    return alike and all(p.is_replicate() or p.is_shard(after.dim() - 1) for p in after.placements)


def divides(node: fx.Node) -> bool:
    """Whether one of the ``FACTORS`` divides."""
    return FACTORS[node.target](2.0) != 2.0


def is_symbolic(node: fx.Node) -> bool:
    """Whether a node is a Python number that Dynamo found to change from call to call."""
    return isinstance(traced(node), (torch.SymFloat, torch.SymInt))


def is_one(node: fx.Node) -> bool:
    """Whether a node is a number, or a tensor with one entry and no more than one dimension."""
    value = traced(node)
    tensor = isinstance(value, torch.Tensor) and value.dim() < 2
    return is_symbolic(node) or (tensor and math.prod(value.shape) == 1)


def written(node: fx.Node) -> list[fx.Node]:
    """The inputs that a node may write into: its running statistics, or any of them all."""
    if node.target not in _NORMS:
        return node.all_input_nodes if overwrites(node) else []
    given = dict(zip(_NORMS[node.target].split(), node.args, strict=False)) | node.kwargs
    statistics = (given.get("running_mean"), given.get("running_var"))
    default = node.target is F.instance_norm
    training = given.get("use_input_stats", given.get("training", default))
    return [n for n in statistics if isinstance(n, fx.Node)] if training is not False else []


def overwrites(node: fx.Node) -> bool:
    """Whether a node writes into one of its inputs."""
    if node.target in _NORMS:
        return bool(written(node))
    name = name_of(node)
    if isinstance(node.target, OpOverload):
        return bool(node.target._schema.is_mutable)
    if name.endswith("_") and not name.endswith("__"):
        return True
    return name in _WRITERS or node.kwargs.get("out") is not None or _asked_in_place(node)


def _asked_in_place(node: fx.Node) -> bool:
    """Whether ``inplace`` is among the arguments and true, by keyword or by position."""
    if "inplace" in node.kwargs or not isinstance(node.target, FunctionType):
        return bool(node.kwargs.get("inplace"))
    names = list(signature(node.target).parameters)
    at = names.index("inplace") if "inplace" in names else len(node.args)
    return bool(node.args[at : at + 1] == (True,))


def name_of(node: fx.Node) -> str:
    """Name of the function or method that a node calls."""
    return getattr(node.target, "__name__", str(node.target))
