"""Linear layers in a Dynamo graph, in any of their spellings."""

import math
import operator
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

from memopt._torch import is_traceable_wrapper_subclass, size_hint
from memopt.emit import same_shape, shape_of, traced
from memopt.passes.steps import TRANSPOSES, cast_of, name_of, written


@dataclass(frozen=True)
class Head:
    """A linear layer ``hidden @ weight.T + bias``.

    Attributes:
        node: the node that computes the product.
        hidden: its input, `(..., H)`.
        weight: `(V, H)`, or `(H, V)` where ``transposed``.
        bias: `(V,)` or None.
        transposed: whether the weight is stored the other way round.
        path: factors on the product that ``node`` contains already; see ``Logits``.
        classes_at: 1 where the product has its classes in the second dimension of three, else -1.
    """

    node: fx.Node
    hidden: fx.Node
    weight: fx.Node
    bias: fx.Node | None
    transposed: bool = False
    path: tuple[fx.Node, ...] = ()
    classes_at: int = -1

    @property
    def classes(self) -> Any:
        """``V``."""
        return shape_of(self.node)[self.classes_at]


def find_head(node: fx.Node) -> Head | None:
    """The linear layer that a node is, in any of its spellings."""
    if node.op not in ("call_function", "call_method") or node.kwargs:
        return None
    target, args = node.target, loosely(node.args)
    if target is F.linear and isinstance(args[0], fx.Node) and isinstance(args[1], fx.Node):
        bias = args[2] if len(args) > 2 else None
        return _checked(Head(node, args[0], args[1], bias))
    if target in (operator.matmul, torch.matmul, torch.mm, "matmul", "mm"):
        return _product(node, args[0], args[1])
    if target in (torch.addmm, "addmm") and len(args) == 3:
        return _product(node, args[1], args[2], args[0])
    if target is torch.einsum:
        equation, *sides = args if len(args) == 3 else (args[0], *args[1])
        if len(sides) != 2:
            return None
        x, w = sides
        return _summed(node, equation, x, w) or _summed(node, equation, w, x, swapped=True)
    return None


def _product(node: fx.Node, hidden: Any, right: Any, bias: Any = None) -> Head | None:
    """``hidden @ weight.T``, or ``weight @ hidden.transpose(1, 2)``."""
    if not (isinstance(hidden, fx.Node) and isinstance(right, fx.Node)):
        return None
    weight = untransposed(_in_place_already(right))
    if weight is not None:
        return _checked(Head(node, hidden, weight, bias))
    if len(shape_of(right)) == 3 and (turned := swapped(right)) is not None:
        return _checked(Head(node, turned, hidden, bias, classes_at=1))
    return _checked(Head(node, hidden, right, bias, transposed=True))


def _summed(node: fx.Node, equation: Any, x: Any, w: Any, *, swapped: bool = False) -> Head | None:
    """``einsum("...h,vh->...v", x, w)``, with any letters, and ``w`` the other way round too."""
    if not (isinstance(equation, str) and isinstance(x, fx.Node) and isinstance(w, fx.Node)):
        return None
    terms, arrow, result = equation.replace(" ", "").replace("...", ".").partition("->")
    sides = terms.split(",")[:: -1 if swapped else 1]
    letters = len(set(sides[0])) == len(sides[0]) and len(set(sides[-1])) == 2
    if not (arrow and letters and len(sides) == 2 and len(sides[1]) == 2):
        return None
    rows, width = sides[0][:-1], sides[0][-1]
    classes = sides[1].replace(width, "")
    if len(classes) != 1 or classes in rows or classes == ".":
        return None
    transposed = sides[1][0] == width
    if result == rows + classes:
        return _checked(Head(node, x, w, None, transposed=transposed))
    if result == rows[:1] + classes + rows[1:] and len(rows) == 2:
        return _checked(Head(node, x, w, None, transposed=transposed, classes_at=1))
    return None


def loosely(arguments: Any) -> Any:
    """Arguments of a node without their type, which is a union of everything."""
    return arguments


def _checked(head: Head) -> Head | None:
    """A head has a 2-D weight, and rows to work on."""
    shape, weight = shape_of(head.hidden), shape_of(head.weight)
    rows_at = 0 if head.transposed else 1
    if len(weight) != 2 or not shape:
        return None
    classes = weight[1 - rows_at]
    result = (*shape[:-1], classes) if head.classes_at == -1 else (shape[0], classes, *shape[1:-1])
    if not same_shape(shape_of(head.node), result):
        return None
    if head.bias is not None and not isinstance(head.bias, fx.Node):
        return None
    if head.bias is not None and not same_shape(shape_of(head.bias), (classes,)):
        return None
    return head


def _in_place_already(node: fx.Node) -> fx.Node:
    """``x`` of ``x.to(device)`` where it is there, as models write for layers on many devices."""
    source = cast_of(node) if len(node.args) == 2 and not node.kwargs else None
    same = source is not None and traced(source).dtype == traced(node).dtype
    return source if source is not None and same else node


def untransposed(node: fx.Node) -> fx.Node | None:
    """``w`` of ``w.t()``, ``w.T`` or ``w.transpose(0, 1)``."""
    if not node.args or not isinstance(node.args[0], fx.Node):
        return None
    flips = node.target in ("t", torch.t, "T", "mT") or (
        node.op == "call_function" and node.target is getattr and node.args[1] in ("T", "mT")
    )
    dims = {d % 2 for d in loosely(node.args[1:3]) if isinstance(d, int)}
    flips = flips or (node.target in TRANSPOSES and dims == {0, 1})
    return node.args[0] if flips and len(shape_of(node)) == 2 else None


def swapped(node: fx.Node) -> fx.Node | None:
    """``x`` of ``x.transpose(1, 2)`` in three dimensions, or of ``x.mT``."""
    if not node.args or not isinstance(node.args[0], fx.Node) or node.kwargs:
        return None
    flips = node.target == "mT" or (node.target is getattr and node.args[1] == "mT")
    dims = {d % 3 for d in loosely(node.args[1:3]) if isinstance(d, int)}
    flips = flips or (node.target in TRANSPOSES and dims == {1, 2})
    return node.args[0] if flips and len(shape_of(node)) == 3 else None


def source_of(node: fx.Node) -> Head | None:
    """The head that a loss's input comes from, by one walk back through shape and value steps."""
    seen = 0
    while seen < 64:
        head = find_head(node)
        if head is not None:
            return head
        inputs = [a for a in node.args[:2] if isinstance(a, fx.Node) and shape_of(a)]
        if node.op not in ("call_function", "call_method") or not inputs:
            return None
        node = max(inputs, key=lambda n: math.prod(map(size_hint, shape_of(n))))
        seen += 1
    return None


def unsafe(head: Head, last: fx.Node, *, sharded: bool = False) -> str:
    """Why the product may not be computed as late as at ``last``, by an operator; or ``""``.

    Args:
        head: the head.
        last: where the operator is to be.
        sharded: whether the operator is to be one of each rank's own classes.
    """
    inputs = [n for n in (head.hidden, head.weight, head.bias) if n is not None]
    if not sharded and any(is_traceable_wrapper_subclass(traced(n)) for n in inputs):
        return "the head is distributed, or of another tensor subclass"
    if transformed(head.node, last):
        return "the head or its loss is inside a functorch transform"
    if writer := overwriter(inputs, head.node, last):
        return f"{writer.name} overwrites an input of the head before the loss"
    return ""


def stops_gradient(node: fx.Node) -> bool:
    """Whether something that a node reads is trained and its result is not, as under no_grad.

    A view that was made there claims to be trained, but is a leaf.
    """
    inputs = [traced(n) for n in node.all_input_nodes]
    trained = any(isinstance(t, torch.Tensor) and t.requires_grad for t in inputs)
    return trained and bool(traced(node).is_leaf)


def transformed(first: fx.Node, last: fx.Node) -> bool:
    """Whether a functorch transform is open at a node, or is opened between it and another."""
    depth = 0
    for node in first.graph.nodes:
        if node is last:
            break
        name = name_of(node)
        depth += name.endswith("_increment_nesting") - name.endswith("_decrement_nesting")
        if depth and node >= first:
            return True
    return False


def between(first: fx.Node, last: fx.Node) -> Iterator[fx.Node]:
    """The nodes behind one and before another, in order."""
    node = first.next
    while first < last and node is not last:
        yield node
        node = node.next


def overwriter(
    values: Iterable[fx.Node],
    first: fx.Node,
    last: fx.Node,
    besides: Collection[fx.Node] = (),
) -> fx.Node | None:
    """The first node between two others that writes to the memory of any of these values.

    Args:
        values: what must stay as it is.
        first: the node before.
        last: the node behind.
        besides: nodes that may write, because they do so to something else.
    """
    held = {memory(value) for value in values}
    late = (n for n in between(first, last) if n not in besides)
    return next((n for n in late if held & set(map(memory, written(n)))), None)


def memory(node: fx.Node) -> Any:
    """What tensors share if they are views of each other; the node where it is no tensor."""
    value = traced(node)
    while is_traceable_wrapper_subclass(value):  # which has no memory of its own
        names, _ = value.__tensor_flatten__()
        value = getattr(value, names[0])
    return value.untyped_storage()._cdata if isinstance(value, torch.Tensor) else node
