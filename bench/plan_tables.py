"""Tables of what `bench.plans` planned."""

from collections.abc import Iterable
from typing import Any

from bench.tables import markdown

Row = dict[str, Any]
_PLANS = """\
Planned on fake tensors, for a device of the table: peak with the gradients in it, what the forward
leaves for the backward on the device and on the host, and the modelled step over the modelled step
of `inductor`. That one is torch's own partition, with no pass of memopt's.
"""
_TUNING = """\
What a training step of a small Llama holds between forward and backward, outputs and all, in MiB,
where a part of it is trained: by autograd's hooks, by torch's own partition with no pass of
memopt's, and by memopt without a budget.
"""
_FRONTIER = """\
The area under each way's curve: over every peak from the lowest that any of them reaches to that
of a step that keeps everything, the mean share of the forward's operations that it runs again. A
way that does not get as low as a peak counts as running all of them. On one graph, by one model of
memory and of operations; **min-cut** is torch's partition, **activation budget** its
`activation_memory_budget` of 0.5, 0.3, 0.1 and 0 as well, **checkpoint** is per block.
"""
_WAYS = ("memopt", "min-cut", "activation budget", "checkpoint")


def plan_section(rows: Iterable[Row]) -> str:
    """The tables of a results file's rows; empty without plans."""
    rows = list(rows)
    parts = []
    for kind, text, table in (
        ("plan", _PLANS, _plan_table),
        ("tuning", _TUNING, _tuning_table),
        ("frontier", _FRONTIER, _frontier_table),
    ):
        if own := [row for row in rows if row["kind"] == kind]:
            parts += [text, table(own)]
    return "\n".join(parts)


def _plan_table(rows: Iterable[Row]) -> str:
    rows = list(rows)
    stock = {row["case"]: row for row in rows if row["peer"] == "inductor"}
    columns = (
        "model", "planned for", "plan", "peak GB", "saved GB", "/ Inductor's", "on the host GB",
        "step / Inductor's", "planned in s",
    )  # fmt: skip
    lines = [
        [
            row["case"],
            row["planned_for"],
            row["peer"],
            f"{row['peak_bytes'] / 1e9:.3f}",
            f"{row['saved_bytes'] / 1e9:.3f}",
            f"{row['saved_bytes'] / stock[row['case']]['saved_bytes']:.3f}",
            f"{row['host_bytes'] / 1e9:.3f}",
            f"{row['step_seconds'] / stock[row['case']]['step_seconds']:.3f}",
            f"{row['planning_seconds']:.1f}",
        ]
        for row in rows
    ]
    return markdown(columns, lines)


def _tuning_table(rows: Iterable[Row]) -> str:
    saved = _by_peer(rows, "held_bytes")
    lines = [
        [
            case,
            *(f"{own[peer] / 2**20:.1f}" for peer in ("eager", "inductor", "memopt")),
            f"{own['memopt'] / own['inductor']:.3f}",
        ]
        for case, own in saved.items()
    ]
    return markdown(("trained", "eager", "inductor", "memopt", "/ Inductor's"), lines)


def _by_peer(rows: Iterable[Row], key: str) -> dict[str, dict[str, float]]:
    found: dict[str, dict[str, float]] = {}
    for row in rows:
        found.setdefault(row["case"], {})[row["peer"]] = row[key]
    return found


def _frontier_table(rows: Iterable[Row]) -> str:
    lines = [
        [case, *(f"{own[way]:.4f}" if way in own else "-" for way in _WAYS)]
        for case, own in _by_peer(rows, "area").items()
    ]
    return markdown(("model", *_WAYS), lines)
