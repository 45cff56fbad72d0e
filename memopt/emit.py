"""New nodes on a Dynamo graph, each with the value that tracing would have given it."""

import contextlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx

from memopt._torch import (
    FakeTensor,
    enter_inference_mode,
    exit_inference_mode,
    pytree,
    size_expr,
)

TRACED = "example_value"
_INHERITED = ("stack_trace", "nn_module_stack", "source_fn_stack", "custom")


def traced(node: fx.Node) -> Any:
    """What Dynamo saw at a node; None where it kept nothing."""
    return node.meta.get(TRACED)


def emit(
    graph: fx.Graph,
    target: Callable[..., Any] | str,
    args: Sequence[Any],
    kwargs: Mapping[str, Any] | None = None,
    *,
    like: fx.Node,
) -> fx.Node:
    """Insert a call, evaluated on the fake values of its arguments.

    Args:
        graph: the graph, positioned by ``graph.inserting_before``.
        target: a function, or the name of a method of the first argument.
        args: its arguments; nodes among them must have traced values.
        kwargs: the same by keyword.
        like: the node whose source line and module the new one inherits.
    """
    args, kwargs = tuple(args), dict(kwargs or {})
    values, named = fx.map_arg((args, kwargs), traced)  # reaches into slices, unlike pytree
    modes = [t.fake_mode for t in pytree.tree_leaves(values) if isinstance(t, FakeTensor)]
    if isinstance(target, str):
        node = graph.call_method(target, args, kwargs)
        call = getattr(values[0], target)
        values = values[1:]
    else:
        node = graph.call_function(target, args, kwargs)
        call = target
    differentiable = getattr(traced(like), "requires_grad", True)
    mode = modes[0] if modes else contextlib.nullcontext()
    with mode, torch.set_grad_enabled(differentiable):
        value = call(*values, **named)
    node.meta.update({key: like.meta[key] for key in _INHERITED if key in like.meta})
    node.meta[TRACED] = value
    return node


def constant(graph: fx.Graph, node: fx.Node, *, like: fx.Node) -> fx.Node:
    """The same values without a gradient; in inference mode there is none, nor may one detach."""
    before = [n for n in graph.nodes if n < like]
    left = {n.args[0] for n in before if n.target is exit_inference_mode}
    modes = [n.args for n in before if n.target is enter_inference_mode and n not in left]
    return node if modes[-1:] == [(True,)] else emit(graph, "detach", (node,), like=like)


def shape_of(node: fx.Node) -> tuple[Any, ...]:
    """The traced shape; empty where the value is no tensor."""
    value = traced(node)
    return tuple(value.shape) if isinstance(value, torch.Tensor) else ()


def extent(graph: fx.Graph, node: fx.Node, dim: int) -> int | fx.Node:
    """One size of a traced tensor: the number, or a node that reads it where it is symbolic."""
    size = shape_of(node)[dim]
    return size if isinstance(size, int) else emit(graph, "size", (node, dim), like=node)


def same_shape(a: Sequence[Any], b: Sequence[Any]) -> bool:
    """Whether two shapes are the same expressions; adds no guard, as ``==`` would."""
    return tuple(map(size_expr, a)) == tuple(map(size_expr, b))
