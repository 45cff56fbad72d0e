"""The decision, as data: JSON that can be read, compared, kept and replayed."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field

from memopt.errors import PlanError
from memopt.stored import count, number, parse, some_list, text_of

SCHEMA = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What crosses from forward to backward in one joint graph.

    Attributes:
        fingerprint: identity of the graph it was made for: operators, shapes and edges.
        saved: names of the saved nodes, sorted.
        peak_bytes: predicted peak of the step above what is resident.
        seconds: modelled time of recomputation and of moving what is saved.
        budget_bytes: the bound it was made under, or None.
        solver: which search found it.
        chunk_rows: rows of a chunk, by name of the chunked operator's node.
        cut: pieces of the stretches that are as wide as a value, by its name.
    """

    fingerprint: str
    saved: tuple[str, ...]
    peak_bytes: int
    seconds: float
    budget_bytes: int | None
    solver: str
    chunk_rows: Mapping[str, int] = field(default_factory=dict)
    cut: Mapping[str, int] = field(default_factory=dict)

    def to_json(self) -> str:
        """Serialise: the same plan gives the same text."""
        body = {
            "schema": SCHEMA,
            "fingerprint": self.fingerprint,
            "solver": self.solver,
            "budget_bytes": self.budget_bytes,
            "peak_bytes": self.peak_bytes,
            "seconds": round(self.seconds, 9),
            "chunk_rows": dict(sorted(self.chunk_rows.items())),
            "cut": dict(sorted(self.cut.items())),
            "saved": sorted(self.saved),
        }
        return json.dumps(body, indent=1)

    @classmethod
    def from_json(cls, text: str) -> "Plan":
        """Read a plan back.

        Raises:
            PlanError: the text is no JSON, misses a field, or has another schema.
        """
        body = parse(text, "plan", "explain(...).graphs[0].plan.to_json() makes one")
        if not isinstance(body, Mapping) or body.get("schema") != SCHEMA:
            seen = body.get("schema") if isinstance(body, Mapping) else type(body).__name__
            raise PlanError(
                f"plan schema is {seen!r:.100}, this version reads {SCHEMA}: plan again"
            )
        try:
            return cls(
                fingerprint=text_of(body["fingerprint"]),
                saved=tuple(sorted(text_of(name) for name in some_list(body["saved"]))),
                peak_bytes=count(body["peak_bytes"], 0),
                seconds=number(body["seconds"], 0),
                budget_bytes=None if body["budget_bytes"] is None else count(body["budget_bytes"]),
                solver=text_of(body["solver"]),
                chunk_rows=_counts(body["chunk_rows"], 0),
                cut=_counts(body.get("cut", {}), 1),
            )
        except (ArithmeticError, KeyError, TypeError, ValueError) as error:
            raise PlanError(
                f"the plan's field is missing or malformed: {error}; plan again"
            ) from error


def _counts(value: object, least: int) -> dict[str, int]:
    if not isinstance(value, Mapping):
        raise TypeError(f"{value!r:.100}, numbers by name are expected")
    return {name: count(entry, least) for name, entry in value.items()}


def fingerprint(lines: list[str]) -> str:
    """A short hash of a graph's description."""
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]
