"""Two results files side by side, as ratios.

Bytes compare across runs as they are. Times drift with the machine, so each is first divided by
Inductor's time in its own run, round by round.
"""

import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.table import Table

from bench.results import load

Rows = dict[tuple[str, str], dict[str, Any]]
BASELINE = "inductor"


def table(before: Path, after: Path) -> Table:
    """Peak, step-time and compile-time ratios (after / before) of every row in both files."""
    old, new = step_rows(load(before)), step_rows(load(after))
    result = Table(title=f"{after.name} / {before.name}")
    for column in ("case", "peer", "peak", "step time / inductor's", "first step / inductor's"):
        result.add_column(column, justify="left" if column in ("case", "peer") else "right")
    for key in [key for key in old if key in new]:
        result.add_row(
            *key,
            _ratio(new[key]["peak_bytes"], old[key]["peak_bytes"]),
            _ratio(relative(new, key, "step_seconds"), relative(old, key, "step_seconds")),
            _ratio(
                relative(new, key, "first_step_seconds"), relative(old, key, "first_step_seconds")
            ),
        )
    return result


def step_rows(results: Mapping[str, Any]) -> Rows:
    """The rows of training steps, by case and peer."""
    return {(row["case"], row["peer"]): row for row in results["rows"] if row["kind"] == "step"}


def relative(rows: Rows, key: tuple[str, str], figure: str) -> float | None:
    """A row's figure over that of stock Inductor on the same case in the same run.

    For ``step_seconds`` it is the median over rounds of the ratio within a round: what slows the
    machine down for longer than a round slows both.
    """
    baseline = rows.get((key[0], BASELINE))
    if baseline is None or not baseline[figure] or rows[key][figure] is None:
        return None
    if figure == "step_seconds":
        own, stock = (row.get("step_seconds_rounds") for row in (rows[key], baseline))
        if own and stock and len(own) == len(stock):
            return float(statistics.median(a / b for a, b in zip(own, stock, strict=True)))
    return float(rows[key][figure]) / float(baseline[figure])


def _ratio(after: float | None, before: float | None) -> str:
    return "-" if after is None or not before else f"{after / before:.3f}"
