"""Whether a mask is causal at every length, and which keys it hides besides.

A mask is the conjunction of others. `position_masks` knows those made of positions; one more may
hide some keys from every query, as padding is hidden.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import fx

from memopt.emit import same_shape, shape_of, traced
from memopt.passes.heads import overwriter, transformed
from memopt.passes.position_masks import JOINING, KEEPING, Formula, formula_of
from memopt.passes.steps import name_of


@dataclass(frozen=True)
class Causal:
    """A mask that shows each query the keys up to its own, whatever the length is.

    Attributes:
        padding: `(B, 1, 1, N)` or `(1, 1, 1, N)`, false for keys that no query sees; None where
            every key is seen.
    """

    padding: fx.Node | None = None

    @staticmethod
    def of(mask: fx.Node, attention: fx.Node) -> "Causal | None":
        """What a mask `(..., N, N)` is known to be, or None.

        Args:
            mask: of booleans.
            attention: the node that reads it.
        """
        known: dict[fx.Node, Formula | None] = {}
        parts = list(_parts(mask, known))
        formulas = [formula_of(part, known) for part in parts]
        padding = [part for part, formula in zip(parts, formulas, strict=True) if not formula]
        bounds = [formula for formula in formulas if formula and not formula.is_true]
        if not bounds or not all(map(_is_causal, bounds)):
            return None
        if len(padding) > 1 or not all(_hides_keys(part, mask) for part in padding):
            return None
        read = {*known, *padding}
        first = min(read)
        writer = overwriter(read, first, attention, besides=known)  # ``and_`` writes to nothing
        if writer is not None or transformed(first, attention):
            return None
        return Causal(*padding)


def _parts(node: fx.Node, known: dict[fx.Node, Formula | None]) -> Iterator[fx.Node]:
    """The masks of which a mask is the conjunction; what joins them is added to ``known``."""
    sources = node.args[:2] if name_of(node) in JOINING else node.args[:1]
    joins = name_of(node) in JOINING or (name_of(node) in KEEPING and _is_mask(node.args[0]))
    if not joins or not all(map(_is_mask, sources)) or node.kwargs.get("out") is not None:
        yield node
        return
    known[node] = None
    for source in cast("tuple[fx.Node, ...]", sources):
        yield from _parts(source, known)


def _is_mask(node: Any) -> bool:
    value = traced(node) if isinstance(node, fx.Node) else None
    return isinstance(value, torch.Tensor) and value.dtype == torch.bool


def _is_causal(formula: Formula) -> bool:
    *others, query, key = (0, 0, *formula.slopes)
    return formula.is_bound and (query, key) == (-1, 1) and not any((*others, formula.constant))


def _hides_keys(part: fx.Node, mask: fx.Node) -> bool:
    """Whether a mask says the same to all heads and queries, of each key for itself."""
    shape, whole = shape_of(part), shape_of(mask)
    if len(shape) != 4 or not all(isinstance(n, int) and n == 1 for n in shape[1:3]):
        return False
    return same_shape(shape[3:], whole[3:])
