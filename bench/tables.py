"""Markdown tables from results files: ``docs/results.md`` and the table in the README."""

from collections.abc import Iterable, Sequence
from typing import Any

from bench.compare import Rows, relative, step_rows
from bench.peers import PEERS
from bench.zoo import MODELS

MIB = 2**20
START, END = "<!-- bench:start -->", "<!-- bench:end -->"
README_PEERS = (
    "eager", "inductor", "inductor+checkpoint",
    "memopt", "memopt @ half of inductor", "memopt min",
)  # fmt: skip

_HOW_TO_READ = """\
- **peak**: exact bytes of one whole training step above what was resident when it started,
  gradients included. `(over)`: above the budget.
- **predicted**: the peak that `memopt.explain` gives, with outputs held.
- **peak / Inductor**, **step / Inductor**: over those of the peer `inductor`; of times, the median
  of the ratios within a round.
- **step**, **CPU**: medians, of the wall clock and of the process.
- **first step**: with empty caches; compilation is the bulk of it.
- **gradient error**: the largest of an entry, relative to the largest entry of its gradient,
  against eager, or with dropout against `inductor`.
- **outputs held**: what the model returned is kept until the backward has ended; **dropped**: all
  of it but the loss is freed first.
- **-**: does not apply, or was not measured: no first step with `--reuse-cache`, no gradient error
  without the peer that it is against.
"""
_SEVERAL_GRAPHS = (
    "The step has several graphs. Without a budget in bytes, what is predicted is the highest "
    "peak of one graph alone; what is measured has what the others hold as well.\n"
)


def markdown(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table whose first column is text and whose others are figures."""
    lines = [columns, [":--", *["--:"] * (len(columns) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def introduction(files: Sequence[dict[str, Any]]) -> str:
    """How to read the page: the columns, and the peers that occur on it."""
    seen = {row["peer"] for results in files for row in results["rows"]}
    peers = [f"- `{name}`: {peer.description}." for name, peer in PEERS.items() if name in seen]
    text = "Every table comes from one run, in which the peers take turns. Columns:\n"
    return "\n".join([text, _HOW_TO_READ, "Peers:\n", *peers, ""])


def about(row: dict[str, Any]) -> str:
    """What a case is, and what its figures do not say."""
    text = f"{row['model']}, {row['dtype']}, outputs {row['outputs']}.\n"
    model = MODELS.get(row["model"])
    return text + (f"\n{_SEVERAL_GRAPHS}" if model and "graph_break" in model.tags else "")


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


def short_line(rows: Rows, key: tuple[str, str]) -> list[str]:
    """Case, peer, peak MiB, peak and step over Inductor's, and the gradient's error."""
    row = rows[key]
    if row["status"] != "ok":
        return [*key, f"{row['status']}: {_one_line(row['error'])}", "", "", ""]
    return [
        *key,
        _mib(row["peak_bytes"]) + (" (over)" if is_over_budget(row) else ""),
        _figure(relative(rows, key, "peak_bytes"), ".3f"),
        _figure(relative(rows, key, "step_seconds"), ".3f"),
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
        "paired rounds). `memopt` has no budget, `memopt min` the lowest peak that it finds, and "
        "`memopt @ half of inductor` half of Inductor's peak. `infeasible`: no plan is that low. "
        "`-`: not measured.\n\n"
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
    if key not in rows:
        return "-"
    if rows[key]["peak_bytes"] is None:
        return str(rows[key]["status"])
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
