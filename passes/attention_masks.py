"""How a mask of attention that is written out is told to one call, so that it means the same."""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, fx

from memopt.emit import emit, shape_of, traced
from memopt.passes.attention_spellings import Mask, WrittenOut, number_of
from memopt.passes.constant_masks import computed, reason_against_constant
from memopt.passes.heads import loosely
from memopt.passes.mask_forms import only_hides, shows_something
from memopt.passes.steps import name_of

_SPREAD = 64  # e to minus this is nothing
_VIEWS = frozenset({"expand", "getitem", "unsqueeze", "to", "view", "reshape", "contiguous"})


@dataclass(frozen=True)
class Told:
    """A mask as the call takes it.

    Attributes:
        kind: ``"none"``; ``"add"``, numbers; ``"show"``, booleans by which every query sees a
            key; ``"nan"``, where one that sees none is NaN; ``"even"``, where for such a query all
            keys weigh the same.
        masks: what it is made of.
        said: in words.
    """

    kind: Literal["none", "add", "show", "nan", "even"] = "none"
    masks: tuple[Mask, ...] = ()
    said: str = ""

    def write(self, graph: fx.Graph, found: WrittenOut) -> tuple[fx.Node | None, fx.Node | None]:
        """The argument, and whether each query sees a key; the graph is positioned."""
        last = found.last
        if self.kind == "none":
            return None, None
        if self.masks[0].fill is None and self.kind != "show":
            added = _placed(graph, self.masks[0].node, self.masks[0], found)
            if self.kind == "add":
                return added, None
            most = emit(graph, "amax", (added, -1, True), like=last)
            return added, emit(graph, torch.gt, (most, -math.inf), like=last)
        shown: fx.Node | None = None
        for mask in self.masks:
            own = mask.node
            if mask.fill is None:
                own = emit(graph, torch.eq, (own, 0), like=last)
            elif mask.hides:
                own = emit(graph, torch.logical_not, (own,), like=last)
            own = _placed(graph, own, mask, found)
            shown = (
                own if shown is None else emit(graph, torch.logical_and, (shown, own), like=last)
            )
        assert shown is not None
        if self.kind == "show":
            return shown, None
        rows = emit(graph, "any", (shown, -1, True), like=last)
        none = emit(graph, torch.logical_not, (rows,), like=last)
        return emit(graph, torch.logical_or, (shown, none), like=last), rows

    @property
    def evens(self) -> bool:
        """Whether a query that sees no key is to see all of them alike."""
        return self.kind in ("nan", "even") and self.masks[0].fill is not None


def told(
    graph: fx.Graph, found: WrittenOut, constants: dict[fx.Node, Tensor | str], most: int
) -> Told | str:
    """How the masks of an attention are told; or why they cannot be.

    Args:
        graph: the graph.
        found: the attention.
        constants: masks that were computed before, which is added to.
        most: numbers that a mask may have to be computed while compiling.
    """
    masks = found.scores.masks

    def value(mask: Mask) -> Tensor | str:
        if reason := reason_against_constant(mask.node, found.last, most):
            return reason
        if mask.node not in constants:
            constants[mask.node] = computed(graph, mask.node)
        return constants[mask.node]

    if not all(shape_of(mask.node) for mask in masks):
        return "its mask is one number, for all scores"
    if any(len(shape_of(mask.node)) > len(shape_of(mask.step)) for mask in masks):
        return "its mask has more dimensions than scores"
    if any(traced(mask.node).requires_grad for mask in masks):
        return "its mask is trained, and what takes that holds the probabilities"
    if not masks:
        return Told()
    if all(mask.fill is not None for mask in masks):
        return _filled(found, masks, [value(mask) for mask in masks])
    if len(masks) > 1:
        return f"{len(masks)} masks are read, and not all of them are booleans"
    return _added(found, masks[0], value(masks[0]))


def _added(found: WrittenOut, mask: Mask, value: Tensor | str) -> Told | str:
    own = traced(mask.node)
    if not own.dtype.is_floating_point:
        return f"what is added is {own.dtype}"
    if isinstance(value, Tensor) and not shows_something(value):
        return "by its mask some query sees no key"
    if own.dtype != traced(found.last).dtype:
        only = isinstance(value, Tensor) and only_hides(value)
        return Told("show", (mask,)) if only else f"its mask is {own.dtype}"
    if isinstance(value, Tensor):
        return Told("add", (mask,))
    if traced(found.last).requires_grad:
        return f"a query may see no key, for the mask is no constant: {value}"
    if _is_finite(mask.node):
        return Told("add", (mask,))
    return Told("nan", (mask,), ", NaN where a query sees no key")


def _filled(found: WrittenOut, masks: tuple[Mask, ...], values: list[Tensor | str]) -> Told | str:
    fills = {mask.fill for mask in masks}
    for mask in masks:
        if not _hides(mask):
            return f"{mask.fill:g} may not hide a key from a query whose scores are as low"
    if math.prod(shape_of(found.softmax)) <= max(math.prod(shape_of(m.node)) for m in masks):
        return "its mask is as large as the probabilities"
    tensors = [value for value in values if isinstance(value, Tensor)]
    if len(tensors) == len(values):
        shown = [~t if m.hides else t for m, t in zip(masks, tensors, strict=True)]
        both = shown[0]
        for one in shown[1:]:
            both = both & one
        if shows_something(both):
            return Told("show", masks)
    if len(fills) > 1:
        return "several numbers are filled in, and a query may see no key"
    if fills == {-math.inf}:
        return Told("nan", masks, ", NaN where a query sees no key")
    return Told("even", masks, ", a mean where a query sees no key")


def _hides(mask: Mask) -> bool:
    """Whether a number hides a key whatever the scores are, as far as their dtype can tell.

    It is the least one, or so large that e to the distance of its neighbours is nothing: scores
    near it would be rounded to whether they count or not.
    """
    assert mask.fill is not None
    kind = torch.finfo(traced(mask.step).dtype)
    return mask.fill <= kind.min or mask.fill * kind.eps <= -_SPREAD


def _is_finite(mask: fx.Node) -> bool:
    """Whether an added mask has finite numbers only, as ``where(shown, 0, least)`` has."""
    while name_of(mask) in _VIEWS and mask.op != "placeholder" and loosely(mask.args):
        if traced(loosely(mask.args[0])).dtype != traced(mask).dtype:
            return False
        mask = loosely(mask.args[0])
    if name_of(mask) != "where" or len(mask.args) != 3:
        return False
    numbers = [number_of(a) for a in mask.args[1:]]
    return all(n is not None and math.isfinite(n) for n in numbers)


def _placed(graph: fx.Graph, node: fx.Node, mask: Mask, found: WrittenOut) -> fx.Node:
    """A mask, or what is made of it, with two dimensions or with batch and heads too."""
    last, rank = found.last, len(shape_of(node))
    if rank == 1:
        return emit(graph, "unsqueeze", (node, 0), like=last)
    if rank != 3:
        return node
    if len(shape_of(mask.step)) == 4 or shape_of(node)[0] == 1:
        return emit(graph, "unsqueeze", (node, 0), like=last)
    return found.with_heads(graph, node)  # by sequence, or by sequence and head
