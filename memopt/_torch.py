"""The only module that imports private names of torch; what breaks on an upgrade breaks here.

Checked on torch 2.13 and written against the 2.11 sources. ``tests/test_torch_names.py`` imports
every name and calls those whose signature matters. On another torch than is supported the first
thing that fails is the check of versions, with its remedy.
"""
# ruff: noqa: E402

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from memopt import _versions

_versions.check()

import torch
import torch.distributed
from torch import fx
from torch._C import _set_throw_on_mutable_data_ptr
from torch._decomp import get_decompositions
from torch._dynamo import config as dynamo_config
from torch._dynamo import mark_static_address
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.exc import BackendCompilerFailed
from torch._dynamo.utils import counters as dynamo_counters
from torch._functorch import config as functorch_config
from torch._functorch._aot_autograd.descriptors import InputMutationAOTOutput
from torch._functorch.compile_utils import fx_graph_cse, raise_getitems
from torch._functorch.partitioners import (
    NodeInfo,
    _extract_fwd_bwd_modules,
    _extract_fwd_bwd_outputs,
    choose_saved_values_set,
    classify_nodes,
    cleanup_recompute_tags,
    force_save_bw_mutation_src,
    force_save_collectives,
    force_save_effectful_ops,
    functionalize_rng_ops,
    has_recomputable_ops,
    has_recomputable_rng_ops,
    thread_graphsafe_rng_from_hops,
)
from torch._guards import tracing
from torch._inductor import aoti_compile_and_package, list_mode_options
from torch._inductor import config as inductor_config
from torch._inductor.choices import InductorChoices
from torch._inductor.codecache import write_atomic
from torch._inductor.compile_fx import compile_fx
from torch._inductor.custom_graph_pass import (
    CustomGraphPass,
    CustomPartitionerFn,
    get_hash_for_files,
)
from torch._inductor.decomposition import select_decomp_table
from torch._inductor.graph import GraphLowering
from torch._inductor.pattern_matcher import stable_topological_sort
from torch._inductor.runtime.cache_dir_utils import cache_dir
from torch._inductor.virtualized import V
from torch._logging._internal import trace_structured
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.autograd.grad_mode import _enter_inference_mode as enter_inference_mode
from torch.autograd.grad_mode import _exit_inference_mode as exit_inference_mode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass
from torch.utils._python_dispatch import _disable_current_modes as disable_modes

if torch.distributed.is_available():
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
else:  # builds of torch for small boards

    class DTensor(torch.Tensor):  # type: ignore[no-redef]
        """No tensor is one."""

    Partial = Replicate = Shard = DTensor  # type: ignore[misc,assignment]

__all__ = [
    "BackendCompilerFailed",
    "CustomGraphPass",
    "CustomPartitionerFn",
    "DTensor",
    "FakeTensor",
    "FakeTensorMode",
    "GraphLowering",
    "InductorChoices",
    "NodeInfo",
    "OpOverload",
    "Partial",
    "Replicate",
    "Shard",
    "TorchDispatchMode",
    "aot_autograd",
    "aoti_compile_and_package",
    "cache_dir",
    "capture_output_code",
    "choose_saved_values_set",
    "classify_nodes",
    "cleanup_recompute_tags",
    "compile_apart",
    "compile_fx",
    "copy_graph",
    "disable_modes",
    "dynamo_config",
    "dynamo_counters",
    "enter_inference_mode",
    "exit_inference_mode",
    "extract_forward_and_backward",
    "force_save_bw_mutation_src",
    "force_save_collectives",
    "force_save_effectful_ops",
    "forward_and_backward_outputs",
    "functionalize_rng_ops",
    "functorch_config",
    "fx_graph_cse",
    "get_decompositions",
    "get_hash_for_files",
    "has_recomputable_ops",
    "has_recomputable_rng_ops",
    "inductor_config",
    "inductor_handlers",
    "is_sym_node",
    "is_traceable_wrapper_subclass",
    "list_mode_options",
    "mark_static_address",
    "mutated_inputs",
    "no_truncated_normals",
    "pytree",
    "raise_getitems",
    "refuse_data_access",
    "select_decomp_table",
    "stable_topological_sort",
    "thread_graphsafe_rng_from_hops",
    "trace_structured",
    "write_atomic",
]

inductor_handlers = V
extract_forward_and_backward = _extract_fwd_bwd_modules
forward_and_backward_outputs = _extract_fwd_bwd_outputs
refuse_data_access = _set_throw_on_mutable_data_ptr


@contextmanager
def capture_output_code(sink: Callable[[str], None]) -> Iterator[None]:
    """Send the source of every module that Inductor emits or loads from its cache to ``sink``."""
    before = GraphLowering.save_output_code

    def tee(code: str) -> None:
        sink(code)
        if before is not None:  # another listener, such as torch's run_and_get_code
            before(code)

    GraphLowering.save_output_code = staticmethod(tee)
    try:
        yield
    finally:
        GraphLowering.save_output_code = before


@contextmanager
def no_truncated_normals() -> Iterator[None]:
    """Leave out the one initialisation that reads its tensor, which a fake one has not."""
    before = torch.nn.init._no_grad_trunc_normal_
    torch.nn.init._no_grad_trunc_normal_ = lambda tensor, *_, **__: tensor
    try:
        yield
    finally:
        torch.nn.init._no_grad_trunc_normal_ = before


@contextmanager
def compile_apart() -> Iterator[None]:
    """Compile something else while a graph is compiled: as stock Inductor would, and unseen."""
    listener = GraphLowering.save_output_code
    GraphLowering.save_output_code = None
    try:
        with (
            tracing(None),
            disable_modes(),
            V.set_choices_handler(InductorChoices()),
            inductor_config.patch(custom_partitioner_fn=None),
            functorch_config.patch(force_non_lazy_backward_lowering=True),
        ):
            yield
    finally:
        GraphLowering.save_output_code = listener


def mutated_inputs(joint: fx.Graph) -> list[fx.Node]:
    """Inputs whose data the forward changes after the graph has run, from AOTAutograd's notes."""
    (output,) = joint.find_nodes(op="output")
    descriptions = pytree.tree_leaves(
        output.meta.get("desc", ()), is_leaf=lambda d: isinstance(d, InputMutationAOTOutput)
    )
    changed = {d.mutated_input for d in descriptions if isinstance(d, InputMutationAOTOutput)}
    return [n for n in joint.find_nodes(op="placeholder") if n.meta.get("desc") in changed]


def is_sym_node(node: fx.Node) -> bool:
    """Whether the node's value is a symbolic integer, float or bool."""
    return isinstance(node.meta.get("val"), torch.SymInt | torch.SymFloat | torch.SymBool)


def copy_graph(graph: fx.Graph) -> fx.Graph:
    """A deep copy that keeps what Dynamo notes at its placeholders."""
    copied = copy.deepcopy(graph)
    for node, twin in zip(graph.nodes, copied.nodes, strict=True):
        if hasattr(node, "_dynamo_source"):
            twin._dynamo_source = node._dynamo_source
    return copied


def size_hint(value: Any) -> int:
    """The integer that tracing saw behind a ``SymInt``; an ``int`` is returned as it is."""
    if isinstance(value, torch.SymInt):
        hint = value.node.hint
        return int(hint) if hint is not None else 8192
    return int(value)


def size_expr(value: Any) -> Any:
    """The sympy expression behind a ``SymInt``, with no guard added; an ``int`` as it is."""
    return value.node.expr if isinstance(value, torch.SymInt) else value
