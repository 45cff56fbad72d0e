"""What a plan of spans says of one layer, and of one length."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from memopt.attention.rules import FULL, Rule
from memopt.plan import fingerprint


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerSpans:
    """One call of attention in a model.

    Attributes:
        name: of the module that makes the call, as in ``named_modules``; with ``#i`` behind it
            where the module makes several.
        query_heads: heads of queries.
        heads: heads of keys; each is read by as many heads of queries.
        width: entries of a query.
        scale: of the scores.
        rules: of each head of keys; empty where the call is not causal self-attention.
        errors: for each head of keys how far its output was off, over its norm, as measured.
    """

    name: str
    query_heads: int
    heads: int
    width: int
    scale: float
    rules: tuple[Rule, ...] = ()
    errors: tuple[float, ...] = ()

    @property
    def signature(self) -> str:
        """What another model's layer of that name would have to have in common."""
        return signature(self.query_heads, self.width, self.scale)

    def spans(self, n: int) -> tuple[int, ...]:
        """Tokens that a query of each head of keys sees besides the sinks, of ``n``."""
        return tuple(min(rule.span(n), n) for rule in self.rules)

    def is_full(self) -> bool:
        """Whether nothing is left out at any length."""
        return all(rule == FULL for rule in self.rules)


@dataclass(frozen=True, slots=True, kw_only=True)
class LengthLoss:
    """What held-out sequences of one length lose.

    Attributes:
        length: in tokens.
        full: mean loss of the model as it is.
        sparse: mean loss under the plan.
        batches: how many there were.
    """

    length: int
    full: float
    sparse: float
    batches: int

    @property
    def change(self) -> float:
        """How much higher the loss is, over the size of that of the model as it is."""
        return (self.sparse - self.full) / (abs(self.full) or 1.0)


def signature(query_heads: int, width: int, scale: float) -> str:
    """Heads of queries, entries of one, and the scale of scores, as text."""
    return f"{query_heads} heads of {width}, scale {scale:.6g}"


def model_fingerprint(layers: Iterable[LayerSpans]) -> str:
    """A short hash of the calls of attention that a model makes: names, heads, widths, scales."""
    return fingerprint([f"{layer.name}: {layer.heads} of {layer.signature}" for layer in layers])


def density(layers: Sequence[LayerSpans], sinks: int, n: int) -> float:
    """The share of ``n`` keys that the last query sees, over the heads of keys that have a rule.

    It is the share of a cache that is read for a new token.
    """
    seen = [min(span + sinks, n) / n for layer in layers for span in layer.spans(n)]
    return sum(seen) / len(seen) if seen else 1.0


def computed(layers: Sequence[LayerSpans], sinks: int, n: int) -> float:
    """The share of the entries of a causal map of ``n`` tokens that are computed."""
    kept = [visible(span, sinks, n) for layer in layers for span in layer.spans(n)]
    return sum(kept) / (len(kept) * visible(n, 0, n)) if kept else 1.0


def visible(span: int, sinks: int, n: int) -> int:
    """Entries of a causal map of ``n`` tokens that a head sees."""
    band = span * n - math.comb(span, 2)
    first = min(sinks, n - span)  # sinks that leave the band, one after another
    return band + first * (n - span) - math.comb(first, 2)
