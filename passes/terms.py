"""Polynomials in probabilities and log-probabilities: what a divergence is made of.

With ``p`` and ``q`` distributions over classes, ``q log q - q log p`` is a polynomial whose
monomials are pairs of a distribution and a log-distribution. Sums, products, exponentials and
logarithms of such polynomials are given where they are polynomials again.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

from torch import fx

from memopt.passes.heads import Head
from memopt.passes.logits import Logits


@dataclass(frozen=True)
class Softmax:
    """The softmax of some logits; two are equal where their values are.

    Attributes:
        product: the node that the logits come from: a head's, or logits that are at hand.
        values: what became of it; see ``Logits.values``.
        trained: whether a gradient flows back through it.
        head: that of ``product``; see ``at_hand``.
        logits: how to come from ``product`` to the logits.
    """

    product: fx.Node
    values: tuple[object, ...]
    trained: bool
    head: Head = field(compare=False)
    logits: Logits = field(compare=False)


@dataclass(frozen=True)
class Mixture:
    """A weighted mean of distributions, each with its share."""

    shares: frozenset[tuple[Softmax, float]]


Distribution = Softmax | Mixture
# The product of a distribution's probability and a distribution's log-probability; either may
# be missing.
Monomial = tuple[Distribution | None, Distribution | None]
Terms = Mapping[Monomial, float]

_LARGEST = 700.0  # whose exponential is still a number

ONE: Monomial = (None, None)


def softmaxes(terms: Terms) -> set[Softmax]:
    """Every softmax that plays a part."""
    found: set[Softmax] = set()
    for distribution in {d for monomial in terms for d in monomial}:
        if isinstance(distribution, Softmax):
            found.add(distribution)
        elif distribution is not None:
            found |= {softmax for softmax, _ in distribution.shares}
    return found


def scaled(terms: Terms, factor: float) -> Terms:
    """The polynomial times a number."""
    return {monomial: factor * value for monomial, value in terms.items()}


def added(left: Terms, right: Terms) -> Terms:
    """The sum of two polynomials, without what cancels."""
    total = {m: left.get(m, 0.0) + right.get(m, 0.0) for m in {**left, **right}}
    return {monomial: value for monomial, value in total.items() if value}


def multiplied(left: Terms, right: Terms) -> Terms | None:
    """Their product, unless a distribution would meet another of the same kind."""
    total: Terms = {}
    for (p, log_p), a in left.items():
        for (q, log_q), b in right.items():
            if (p and q) or (log_p and log_q):
                return None
            total = added(total, {(p or q, log_p or log_q): a * b})
    return total


def divergence_terms(given: Terms, target: Terms, *, log_target: bool) -> Terms | None:
    """``kl_div(given, target)`` elementwise: ``target * (log target - given)``."""
    p = exponential(target) if log_target else target
    log_p = target if log_target else logarithm(target)
    if p is None or log_p is None:
        return None
    return multiplied(p, added(log_p, scaled(given, -1.0)))


def exponential(terms: Terms) -> Terms | None:
    """Of one log-probability, with a number beside it perhaps."""
    if abs(terms.get(ONE, 0.0)) > _LARGEST:
        return None
    shift = math.exp(terms.get(ONE, 0.0))
    rest = [(d, value) for (_, d), value in terms.items() if d]
    plain = all(p is None for p, _ in terms)
    return {(rest[0][0], None): shift} if plain and [v for _, v in rest] == [1.0] else None


def logarithm(terms: Terms) -> Terms | None:
    """Of one probability, or of shares of several."""
    if any(p is None or log_p for p, log_p in terms):
        return None
    shares = {p: value for (p, _), value in terms.items()}
    if not all(value > 0 for value in shares.values()):
        return None
    if len(shares) == 1:
        ((p, value),) = shares.items()
        return added({(None, p): 1.0}, {ONE: math.log(value)})
    total = sum(shares.values())
    parts = [(p, round(v / total, 12)) for p, v in shares.items() if isinstance(p, Softmax)]
    if len(parts) < len(shares) or not parts:
        return None
    return added({(None, Mixture(frozenset(parts))): 1.0}, {ONE: math.log(total)})


def frozen(softmax: Softmax) -> Softmax:
    """The same numbers as constants."""
    return replace(softmax, trained=False)


def mapped(terms: Terms, change: Callable[[Softmax], Softmax]) -> Terms:
    """The same polynomial in changed softmaxes."""

    def of(distribution: Distribution | None) -> Distribution | None:
        if isinstance(distribution, Mixture):
            shares = frozenset((change(s), share) for s, share in distribution.shares)
            return Mixture(shares)
        return None if distribution is None else change(distribution)

    return {(of(p), of(log_p)): value for (p, log_p), value in terms.items()}
