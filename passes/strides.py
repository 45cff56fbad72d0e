"""What becomes of the nodes behind a value that lies in memory in another order."""

import contextlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx

from memopt._torch import FakeTensor, pytree
from memopt.emit import TRACED, same_shape, traced
from memopt.passes.steps import overwrites


def reorder(old: fx.Node, value: Tensor) -> str:
    """Let the nodes behind one see a value of the same shape and other strides.

    Their traced values are brought up to date, as far as the strides of any change.

    Args:
        old: the node that is going to be replaced.
        value: the fake value that replaces its own.

    Returns:
        The reason why that cannot be, such as a ``view`` that is none any more; then nothing has
        changed.
    """
    known, todo = {old: value}, [old]
    while todo:
        for user in sorted(todo.pop(0).users):
            if user.op == "output":
                return "the graph returns it, in another order in memory"
            new = _evaluated(user, known)
            if new is None:
                return f"{user.name} reads it in another order in memory"
            if user not in known and not _alike(traced(user), new):
                todo.append(user)
                known[user] = new
    for node, new in known.items():
        if node is not old:
            node.meta[TRACED] = new
    return ""


def _evaluated(node: fx.Node, known: Mapping[fx.Node, Any]) -> Any:
    """A node's value with some inputs replaced; None where there is none."""
    if node.op not in ("call_function", "call_method") or overwrites(node):
        return None
    args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: known.get(n, traced(n)))
    target: Any = node.target
    if node.op == "call_method":
        target, args = getattr(args[0], target), args[1:]
    modes = [v.fake_mode for v in pytree.tree_leaves((args, kwargs)) if isinstance(v, FakeTensor)]
    differentiable = any(t.requires_grad for t in _tensors(traced(node)))
    with modes[0] if modes else contextlib.nullcontext(), torch.set_grad_enabled(differentiable):
        try:
            return target(*args, **kwargs)
        except (RuntimeError, TypeError, AttributeError, ValueError):
            return None  # a view that is impossible, or an input that was not traced


def _alike(before: Any, after: Any) -> bool:
    pairs = zip(_tensors(before), _tensors(after), strict=True)
    return all(same_shape(a.stride(), b.stride()) for a, b in pairs)


def _tensors(value: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor)]
