"""How far a head looks back, as a rule of the sequence's length.

A kind of rule is a frozen dataclass of counts with a ``kind``, a ``span`` and its ``candidates``;
another one joins by its line in ``KINDS``.

Source: elastic rules are MoA's: Fu et al. (2024), arXiv:2406.14909.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

from memopt.errors import PlanError

_STEPS = 16  # values of ``alpha`` that are tried, over the longest sequence


class Rule(Protocol):
    """What a head sees besides its sinks: the newest ``span(n)`` of ``n`` tokens."""

    kind: ClassVar[str]

    def span(self, n: Any) -> Any:
        """Tokens that a query sees, its own included, of ``n``: a number, symbolic or not."""

    @classmethod
    def candidates(cls, lengths: Sequence[int], block: int) -> Sequence["Rule"]:
        """Rules to choose from for sequences of these lengths, in steps of ``block`` tokens."""


@dataclass(frozen=True, slots=True)
class Elastic:
    """``alpha + eighths / 8 * n``, rounded up.

    Attributes:
        alpha: tokens.
        eighths: of the length.
    """

    kind: ClassVar[str] = "elastic"
    alpha: int
    eighths: int

    def span(self, n: Any) -> Any:
        """As ``Rule.span``."""
        return self.alpha + (self.eighths * n + 7) // 8

    @classmethod
    def candidates(cls, lengths: Sequence[int], block: int) -> Sequence[Rule]:
        """As ``Rule.candidates``; of rules that agree on these lengths, the steepest is first."""
        longest = max(lengths)
        step = block * max(1, round(longest / _STEPS / block))
        alphas = range(0, longest + step, step)
        rules = [cls(alpha, eighths) for eighths in range(8, -1, -1) for alpha in alphas]
        return [rule for rule in rules if min(map(rule.span, lengths)) > 0]


KINDS: Mapping[str, type[Rule]] = {kind.kind: kind for kind in (Elastic,)}
FULL = Elastic(0, 8)
"""All of the sequence."""


def distinct(rules: Sequence[Rule], lengths: Sequence[int]) -> list[Rule]:
    """The first of all rules with the same spans of these lengths."""
    found: dict[tuple[int, ...], Rule] = {}
    for rule in rules:
        found.setdefault(tuple(min(rule.span(n), n) for n in lengths), rule)
    return list(found.values())


def to_dict(rule: Rule) -> dict[str, object]:
    """A rule as plain JSON types."""
    fields: Any = rule
    return {"kind": rule.kind, **dataclasses.asdict(fields)}


def from_dict(body: object) -> Rule:
    """The rule that ``to_dict`` wrote.

    Raises:
        PlanError: it is of no known kind, or its fields are not counts.
    """
    given = dict(body) if isinstance(body, Mapping) else {}
    kind = given.pop("kind", None)
    if not isinstance(kind, str) or kind not in KINDS:
        raise PlanError(f"{body!r} is no rule of a span: known kinds are {sorted(KINDS)}")
    fields: Any = KINDS[kind]
    names = [field.name for field in dataclasses.fields(fields)]
    if sorted(given) != sorted(names):
        raise PlanError(f"a rule of kind {kind!r} has the fields {names}, not {sorted(given)}")
    for name, value in given.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            raise PlanError(f"{name!r} of a rule is {value!r}: allowed is a number from 0 on")
    rule: Rule = KINDS[kind](**given)
    return rule
