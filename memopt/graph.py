"""Predicates over FX nodes: what a node is, decided from its operator's schema and tags."""

import enum
import functools
import operator
import os
import re
from typing import Any

import torch
from torch import fx

from memopt._torch import OpOverload, is_sym_node, pytree, size_expr, size_hint

aten = torch.ops.aten
prims = torch.ops.prims
TURNS = (aten.t.default, aten.permute.default, aten.transpose.int)
"""Operators that only change the order of dimensions."""


class OpKind(enum.IntEnum):
    """How a lowering that fuses treats a node."""

    INPUT = 0  # placeholder or constant: resident before the step starts
    VIEW = 1  # another name for its input's storage
    POINTWISE = 2  # loops over its output: fuses with its readers and its inputs
    REDUCTION = 3  # loops over its inputs and fuses with them; its result is always written
    EXTERN = 4  # a library call, or opaque: reads and writes memory
    SYMBOL = 5  # an integer, no bytes


# Loop-shaped operators that carry no ``pointwise`` tag but that Inductor inlines as such.
_POINTWISE_NAMES = frozenset(
    "aten.embedding aten.gather aten.index aten.slice_scatter aten.select_scatter "
    "aten.constant_pad_nd aten.full aten.full_like aten.zeros aten.zeros_like aten.ones "
    "aten.ones_like aten.arange aten.iota prims.iota aten._to_copy aten.cat aten.repeat "
    "aten.new_zeros aten.new_ones aten.new_full aten.scalar_tensor aten.tril aten.triu "
    "aten.flip aten._unsafe_index prims.inductor_random prims.inductor_lookup_seed "
    "prims.inductor_randint aten.lift_fresh_copy aten.empty aten.empty_like aten.roll "
    "aten.diagonal_scatter aten.as_strided_scatter prims.convert_element_type "
    "aten.native_dropout aten.rand_like aten.bernoulli aten._unsafe_masked_index "
    "prims._low_memory_max_pool_offsets_to_indices aten.upsample_nearest2d.default "
    "aten.avg_pool2d aten.copy".split()
)
# Their result is their first input with some entries changed, and Inductor lets it take its place.
_SCATTER_NAMES = frozenset(
    "aten.index_put aten._unsafe_index_put aten._unsafe_masked_index_put_accumulate aten.scatter "
    "aten.scatter_add aten.scatter_reduce aten.index_add aten.index_copy memopt.put_rows".split()
)
_REDUCTION_NAMES = _SCATTER_NAMES | frozenset(
    "aten.mean aten.var aten.var_mean aten.std prims.var prims.sum "
    "prims.prepare_softmax_online aten.argmax aten.argmin aten.cumsum aten.norm "
    "aten.linalg_vector_norm aten.any aten.all aten.amax aten.amin aten.logsumexp aten.max "
    "aten.min aten.prod aten.sum aten.nll_loss_forward".split()
)
# Views whose schema does not say so.
_UNDECLARED_VIEWS = frozenset({aten._unsafe_view.default, aten.lift_fresh.default})
# Seeded draws whose seed is an explicit argument: the same input gives the same output.
_EXPLICIT_SEED_NAMES = frozenset(
    {"prims.inductor_random", "prims.inductor_randint", "prims.inductor_lookup_seed"}
)
# Operators of ours that cost little more than their reads and writes.
_REPEATABLE_NAMES = frozenset(
    "memopt.norm memopt.gated memopt.gated_packed memopt.rotary memopt.softmax".split()
)
_DETERMINISTIC_NAMESPACES = frozenset({"aten", "prims", "inductor_prims", "mkldnn", "quantized"})


@functools.cache
def packet_name(target: Any) -> str:
    """``"aten.mm"`` for ``aten.mm.default``; the plain name of anything else."""
    if isinstance(target, OpOverload):
        return str(target.overloadpacket)
    return getattr(target, "__name__", str(target))


def tensors(value: Any) -> list[torch.Tensor]:
    """Every tensor in a node's traced value."""
    if isinstance(value, torch.Tensor):
        return [value]
    return [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, torch.Tensor)]


def is_view(node: fx.Node) -> bool:
    """Whether the node's value shares its first input's storage."""
    target = node.target
    if target is operator.getitem:
        return True
    if not isinstance(target, OpOverload) or target in _UNDECLARED_VIEWS:
        return isinstance(target, OpOverload)
    schema = target._schema
    return not schema.is_mutable and any(r.alias_info is not None for r in schema.returns)


def is_mutating(node: fx.Node) -> bool:
    """Whether the node writes to one of its inputs."""
    target = node.target
    return isinstance(target, OpOverload) and target._schema.is_mutable


def overwrites(node: fx.Node) -> bool:
    """Whether the node's second result is to take the place of its first input.

    Without chunks it cannot, and the planner may have given them up since the node was marked.
    """
    if OVERWRITES not in node.meta or not isinstance(node.target, OpOverload):
        return False
    names = [argument.name for argument in node.target._schema.arguments]
    return bool(node.args[names.index("chunk_rows")] != 0)


def is_check(node: fx.Node) -> bool:
    """Whether the node is there to raise an error only: it has no value and writes to nothing."""
    target = node.target
    return (
        isinstance(target, OpOverload)
        and not target._schema.returns
        and not target._schema.is_mutable
    )


def is_collective(node: fx.Node) -> bool:
    """Whether the node talks to other ranks; it must run the same number of times on each."""
    namespace = getattr(node.target, "namespace", "")
    return namespace in ("_c10d_functional", "c10d_functional", "c10d", "_dtensor", "symm_mem")


def is_wait(node: fx.Node) -> bool:
    """Whether the node waits for a collective: its value is the collective's, once it is there."""
    return is_collective(node) and packet_name(node.target).endswith(".wait_tensor")


def awaited(wait: fx.Node) -> fx.Node:
    """The collective that a node waits for, or the input where it was started elsewhere."""
    node = wait.all_input_nodes[0]
    return node.all_input_nodes[0] if node.target is operator.getitem else node


def is_random(node: fx.Node) -> bool:
    """Whether running the node again would draw other numbers.

    Attention kernels carry the random tag whatever their dropout; with probability 0 they
    are deterministic.
    """
    target = node.target
    if not isinstance(target, OpOverload):
        return False
    if torch.Tag.nondeterministic_seeded not in target.tags:
        return False
    if packet_name(target) in _EXPLICIT_SEED_NAMES:
        return False
    for position, argument in enumerate(target._schema.arguments):
        if argument.name == "dropout_p":
            given = node.args[position] if position < len(node.args) else None
            return bool(node.kwargs.get("dropout_p", given))
    return True


READ_ONCE = "memopt_read_once"
"""Set in ``node.meta`` where what the node reads has another value when the backward runs."""

OVERWRITES = "memopt_overwrites"
"""Set in ``node.meta`` where the node's first input dies and may take the node's second result."""

IN_PLACE = "memopt_in_place"
"""Set in ``node.meta`` where the node's value is to be written over its first input."""

INLINED = "memopt_inlined"
"""Set in ``node.meta`` where the planner takes the value to be computed inside its readers."""


def is_recomputable(node: fx.Node) -> bool:
    """Whether running the node a second time is certain to give the same value.

    Random, mutating, collective, effectful and opaque custom operators are not.
    """
    if node.op != "call_function" or READ_ONCE in node.meta:
        return False
    if not isinstance(node.target, OpOverload):
        return node.target is operator.getitem or is_sym_node(node)
    if packet_name(node.target) in _REPEATABLE_NAMES:
        return True
    if node.target.namespace not in _DETERMINISTIC_NAMESPACES:
        return False
    return not (is_random(node) or is_mutating(node) or is_collective(node))


def op_kind(node: fx.Node) -> OpKind:
    """How a fusing lowering treats the node."""
    if node.op != "call_function":
        return OpKind.INPUT
    if not tensors(node.meta.get("val")):
        return OpKind.SYMBOL
    if is_view(node):
        return OpKind.VIEW
    target = node.target
    if isinstance(target, OpOverload):
        name = packet_name(target)
        if torch.Tag.pointwise in target.tags or name in _POINTWISE_NAMES:
            return OpKind.POINTWISE
        if name in _REDUCTION_NAMES or "reduction" in {
            str(t).rsplit(".")[-1] for t in target.tags
        }:
            return OpKind.REDUCTION
    return OpKind.EXTERN


def on_host(node: fx.Node) -> bool:
    """Whether the node's value is a copy that lies in the host's memory."""
    return packet_name(node.target) == "memopt.to_host"


def is_scatter(node: fx.Node) -> bool:
    """Whether the result is the first input with some entries changed, and may take its place."""
    return packet_name(node.target) in _SCATTER_NAMES


def backward_nodes(graph: fx.Graph) -> set[fx.Node]:
    """What depends on an incoming gradient, in a joint graph."""
    late: set[fx.Node] = set()
    for node in graph.nodes:
        tangent = node.op == "placeholder" and "tangents" in str(node.target)
        if tangent or (node.op != "output" and not late.isdisjoint(node.all_input_nodes)):
            late.add(node)
    return late


def stretches(graph: fx.Graph) -> dict[fx.Node, int]:
    """For each node, how many library calls run before it."""
    before, count = {}, 0
    for node in graph.nodes:
        before[node] = count
        count += op_kind(node) is OpKind.EXTERN
    return before


def storage_nbytes(tensor: torch.Tensor) -> tuple[int, Any]:
    """Bytes of the storage behind a fake tensor: the traced value, and its sympy expression.

    A dense tensor's bytes are ``numel * itemsize``. A tensor with gaps or an offset reports
    its storage's.
    """
    nbytes = tensor.untyped_storage().nbytes()
    return size_hint(nbytes), size_expr(nbytes)


_FRAME = re.compile(r'File "(?P<file>[^"]+)", line (?P<line>\d+)')


def source_line(node: fx.Node) -> str:
    """The user's ``file:line`` for a node: the innermost frame outside torch, or ``""``."""
    trace = node.meta.get("stack_trace") or ""
    frames = _FRAME.findall(trace)
    for file, line in reversed(frames):
        if f"{os.sep}torch{os.sep}" not in file:
            return f"{_short(file)}:{line}"
    return ""


def _short(file: str) -> str:
    """The last three components of a path: enough to find it, short enough for a table."""
    return os.sep.join(file.split(os.sep)[-3:])
