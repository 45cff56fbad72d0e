"""The page of coverage, from its results file."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from bench.coverage import OPERATORS
from bench.tables import environment, markdown

_HOW_TO_READ = """\
Instances that one forward of each causal language model of `transformers` runs, small and with
random weights, and what became of them: `9` all were put into operators, `7 + 2` two of nine were
declined with a reason, `6 + 2 of 9` one was not seen. `-`: the family has none.

- **norm**: modules that are called a layer norm or an RMS norm.
- **gate**: modules with the two layers of a gated activation, or with both in one.
- **rotary**: tensors that a function called after rotary embeddings returns: queries and keys.

Instances are counted in eager, without the passes.
"""


def page(results: dict[str, Any]) -> str:
    """The whole page.

    Args:
        results: a results file whose rows are of the kind ``coverage``.
    """
    rows = results["rows"]
    counted = [row for row in rows if row["status"] == "ok"]
    parts = [
        "# Coverage\n",
        environment(results),
        _HOW_TO_READ,
        _summary(counted),
        "## Families\n",
        markdown(("family", *OPERATORS), [_line(row) for row in counted]),
        "## Reasons\n",
        _reasons(counted),
    ]
    failed = [(row["family"], row["status"]) for row in rows if row["status"] != "ok"]
    if failed:
        parts += ["## Not counted\n", markdown(("family", "reason"), failed)]
    return "\n".join(parts)


def _line(row: Mapping[str, Any]) -> list[str]:
    return [row["family"], *(_cell(row[operator]) for operator in OPERATORS)]


def _cell(own: Mapping[str, Any]) -> str:
    instances, matched, declined = _split(own)
    if not instances:
        return "-"
    text = f"{matched} + {declined}" if declined or matched < instances else f"{matched}"
    return text if matched + declined == instances else f"{text} of {instances}"


def _split(own: Mapping[str, Any]) -> tuple[int, int, int]:
    """Instances, matched ones, and declined ones; a layer may hold several of the operator."""
    instances = own["instances"]
    matched = min(instances, own["matched"])
    declined = min(instances - matched, sum(own["declined"].values()))
    return instances, matched, declined


def told_share(rows: Sequence[Mapping[str, Any]], operator: str) -> float:
    """The share of instances that are in operators, or have a reason."""
    parts = [_split(row[operator]) for row in rows]
    total = sum(instances for instances, _, _ in parts)
    return sum(matched + declined for _, matched, declined in parts) / total if total else 1.0


def _summary(rows: Sequence[Mapping[str, Any]]) -> str:
    lines = []
    for operator in OPERATORS:
        parts = [_split(row[operator]) for row in rows]
        families = sum(instances > 0 for instances, _, _ in parts)
        sums = [sum(column) for column in zip(*parts, strict=True)]
        share = f"{100 * told_share(rows, operator):.1f} %"
        lines.append([operator, str(families), *map(str, sums), share])
    columns = ("operator", "families", "instances", "matched", "declined", "matched or declined")
    return markdown(columns, lines)


def _reasons(rows: Sequence[Mapping[str, Any]]) -> str:
    families, instances = Counter[tuple[str, str]](), Counter[tuple[str, str]]()
    for row in rows:
        for operator in OPERATORS:
            for reason, count in row[operator]["declined"].items():
                families[operator, reason] += 1
                instances[operator, reason] += count
    lines = [
        [f"{operator}: {reason}", str(families[operator, reason]), str(count)]
        for (operator, reason), count in instances.most_common()
    ]
    return markdown(("reason", "families", "instances"), lines)
