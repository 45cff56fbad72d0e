"""Markdown tables from results files: ``docs/results.md`` and the table in the README."""

from collections.abc import Iterable, Sequence
from typing import Any

from bench.compare import Rows, relative, step_rows

MIB = 2**20
START, END = "<!-- bench:start -->", "<!-- bench:end -->"
README_PEERS = (
    "eager", "inductor", "inductor+checkpoint",
    "memopt", "memopt @ half of inductor", "memopt min",
)  # fmt: skip


def markdown(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table whose first column is text and whose others are figures."""
    lines = [columns, [":--", *["--:"] * (len(columns) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def environment(results: dict[str, Any]) -> str:
    """One paragraph: what the figures were measured with."""
    versions = ", ".join(f"{name} {v}" for name, v in results["versions"].items() if v)
    device = results["device"]
    return (
        f"Measured {results['date']} at commit `{results['commit'] or 'none'}` on "
        f"{device['name']} ({device['type']}, {device['cores']} cores, {device['threads']} "
        f"threads), {versions}, seed {results['seed']}: `{results['command']}`.\n"
    )


def case_table(rows: Rows, case: str) -> str:
    """Every peer of one case."""
    columns = ("peer", "budget MiB", "predicted MiB", "peak MiB", "peak / Inductor", "step s",
               "step / Inductor", "CPU s", "first step s", "gradient error")  # fmt: skip
    return markdown(columns, [_case_line(rows, key) for key in rows if key[0] == case])


def _case_line(rows: Rows, key: tuple[str, str]) -> list[str]:
    row = rows[key]
    if row["status"] != "ok":
        return [key[1], f"{row['status']}: {_one_line(row['error'])}", *[""] * 8]
    return [
        key[1],
        _budget(row["memory_budget"]),
        _mib(row.get("predicted_peak_bytes")),
        _mib(row["peak_bytes"]) + (" (over)" if is_over_budget(row) else ""),
        _figure(relative(rows, key, "peak_bytes"), ".3f"),
        _figure(row["step_seconds"], ".3f"),
        _figure(relative(rows, key, "step_seconds"), ".3f"),
        _figure(row["cpu_seconds"], ".3f"),
        _figure(row["first_step_seconds"], ".1f"),
        _figure(row["gradient_error"], ".1e"),
    ]


def is_over_budget(row: dict[str, Any]) -> bool:
    """Whether a budget in bytes was exceeded."""
    budget, peak = row["memory_budget"], row["peak_bytes"]
    return isinstance(budget, int) and peak is not None and peak > budget


def startup_table(results: dict[str, Any]) -> str:
    """First-step seconds with cold and warm caches; empty if none were measured."""
    seconds = {
        (row["peer"], row["phase"]): row["seconds"]
        for row in results["rows"]
        if row["kind"] == "startup"
    }
    if not seconds:
        return ""
    peers = list(dict.fromkeys(peer for peer, _ in seconds))
    lines = [
        [peer, *(_figure(seconds.get((peer, phase)), ".1f") for phase in ("cold", "warm"))]
        for peer in peers
    ]
    return markdown(("first step of a process", "cold s", "warm s"), lines)


def readme_table(files: Iterable[dict[str, Any]]) -> str:
    """One line per case: peak in MiB and step time relative to stock Inductor, by peer.

    Cases without a budget among their peers are left to the page of results. Of a case that was
    measured more than once, the last file counts.
    """
    budgets = [peer for peer in README_PEERS if peer.startswith("memopt ")]
    lines: dict[str, list[str]] = {}
    for results in files:
        rows = step_rows(results)
        for case in dict.fromkeys(key[0] for key in rows):
            if any((case, peer) in rows for peer in budgets):
                lines[case] = [case, *(_cell(rows, (case, peer)) for peer in README_PEERS)]
    note = (
        "Peak MiB of a whole training step, and step time relative to stock Inductor (median of "
        "paired rounds).\n\n"
    )
    return note + markdown(("case", *README_PEERS), list(lines.values()))


def put_between_markers(text: str, table: str) -> str:
    """``text`` with what lies between the two markers replaced.

    Raises:
        ValueError: the markers are not there.
    """
    head, start, rest = text.partition(START)
    _, end, tail = rest.partition(END)
    if not (start and end):
        raise ValueError(f"no place for the table: put the lines {START} and {END} in it")
    return f"{head}{START}\n\n{table}\n{END}{tail}"


def _cell(rows: Rows, key: tuple[str, str]) -> str:
    if key not in rows or rows[key]["peak_bytes"] is None:
        return "-"
    ratio = _figure(relative(rows, key, "step_seconds"), ".2f")
    return f"{_mib(rows[key]['peak_bytes'])} · {ratio}x"


def _budget(budget: int | float | str | None) -> str:
    if budget is None:
        return "-"
    return _mib(budget) if isinstance(budget, int) else str(budget)


def _mib(nbytes: int | None) -> str:
    return "-" if nbytes is None else f"{nbytes / MIB:.1f}"


def _figure(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _one_line(text: str, limit: int = 80) -> str:
    line = " ".join(text.split()).replace("|", "\\|")
    return line if len(line) <= limit else line[: limit - 1] + "…"
