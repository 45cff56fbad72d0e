"""Recognises tensors that a graph makes to hold 0, 1, 2 and so on."""

from typing import Any

import torch
from torch import fx

from memopt.emit import same_shape, shape_of, traced
from memopt.passes.heads import loosely, overwriter


def is_arange(target: fx.Node | None, size: Any, last: fx.Node) -> bool:
    """Whether integers are 0, 1, 2 and so on up to ``size``, and stay so up to a node."""
    node = target
    while node is not None and node.target in ("to", "long", "cuda", "contiguous"):
        node = loosely(node.args[0])
    if target is None or node is None or node.target is not torch.arange:
        return False
    start = node.kwargs.get("start", node.args[0] if len(node.args) > 1 else 0)
    step = node.kwargs.get("step", node.args[2] if len(node.args) > 2 else 1)
    counts = (start, step) == (0, 1) and same_shape(shape_of(node), (size,))
    integers = traced(node).dtype == traced(target).dtype == torch.int64
    return counts and integers and overwriter((node, target), node, last) is None
