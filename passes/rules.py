"""A spelling of an operator, what it matched in a graph, and what its operator reads of that."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from memopt.emit import emit, traced
from memopt.passes.heads import between
from memopt.passes.patterns import Match, Pattern
from memopt.passes.steps import cast_of, name_of

_MODES = frozenset({"_set_grad_enabled", "_enter_inference_mode", "_exit_inference_mode"})


@dataclass(frozen=True)
class Found:
    """One rule's match in a graph.

    Attributes:
        rule: the rule.
        match: what its names stand for.
        last: the node whose value it is.
    """

    rule: "Rule"
    match: Match
    last: fx.Node

    def __getitem__(self, name: str) -> Any:
        """What a name stands for; None where the spelling leaves it out."""
        return self.match.bound.get(name)

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the result."""
        dtype: torch.dtype = traced(self.last).dtype
        return dtype


@dataclass(frozen=True)
class Written:
    """An operator that is in the graph and that nobody reads yet.

    Attributes:
        said: what it is, in a few words.
        results: what takes the place of which node.
    """

    said: str
    results: Mapping[fx.Node, fx.Node] = field(default_factory=dict)


@dataclass(frozen=True)
class Rule:
    """One spelling of an operator, or one that looks like it and is another.

    Attributes:
        name: of the spelling.
        pattern: what it looks like.
        why: who writes it so; or, without a replacement, why it is not the operator.
        guard: why a match is to be left alone, or ``""``.
        write: puts the operator into the graph; None where there is none to put.
    """

    name: str
    pattern: Pattern
    why: str
    guard: Callable[[Found], str] | None = None
    write: Callable[[fx.Graph, Found], Written] | None = None


def changes_mode(first: fx.Node, last: fx.Node) -> bool:
    """Whether recording gradients is switched on or off between two nodes."""
    return any(name_of(node) in _MODES for node in between(first, last))


def as_result(found: Found, value: fx.Node) -> fx.Node:
    """An operator's result in the dtype of what it replaces."""
    if traced(value).dtype == found.dtype:
        return value
    return emit(found.last.graph, "to", (value, found.dtype), like=found.last)


def as_wide(found: Found, node: fx.Node) -> fx.Node:
    """An input in the dtype of a match's result, if that is wider; else the input."""
    if not widens(found, node):
        return node
    for cast in found.match.casts:
        if cast_of(cast) is node and traced(cast).dtype == found.dtype:
            return cast
    return emit(found.last.graph, "to", (node, found.dtype), like=found.last)


def widens(found: Found, node: fx.Node) -> bool:
    """Whether a match's result has a wider dtype than an input."""
    before = traced(node).dtype
    return before != found.dtype and torch.promote_types(before, found.dtype) == found.dtype


def converts(found: Found, node: fx.Node) -> bool:
    """Whether neither of an input's dtype and the result's holds the other."""
    both = torch.promote_types(traced(node).dtype, found.dtype)
    return both not in (traced(node).dtype, found.dtype)
