"""The report in a terminal: what one graph came to, in a few lines and two tables."""

import math
import re
from collections import Counter
from collections.abc import Iterator, Sequence

from rich.console import RenderableType
from rich.padding import Padding
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

from memopt.record import DecisionRow, GraphRecord
from memopt.remarks import Remark, RemarkKind
from memopt.units import format_bytes, format_seconds

_MOST_DECISIONS = 10
_MOST_REMARKS = 20
_KIND_STYLES = {
    RemarkKind.APPLIED: "green",
    RemarkKind.MISSED: "yellow",
    RemarkKind.ANALYSIS: "cyan",
}


def graph_parts(graph: GraphRecord) -> Iterator[RenderableType]:
    """What a terminal shows of one graph: figures, the largest decisions, remarks."""
    mode = "training" if graph.training else "inference"
    yield Text()
    yield Rule(Text(f"{graph.id} · {mode} · {graph.lowering}", style="bold"), align="left")
    figures = Table.grid(padding=(0, 2))
    figures.add_column(style="dim", no_wrap=True)
    figures.add_column()
    for name, value in _figures(graph):
        figures.add_row(name, Text(value))
    yield Padding(figures, (0, 1))
    if graph.decisions:
        yield Text()
        yield _decision_table(graph.decisions)
    if graph.remarks:
        yield Text()
        yield _remark_table(graph.remarks)


def _figures(graph: GraphRecord) -> Iterator[tuple[str, str]]:
    before, after = graph.baseline_peak_bytes, graph.predicted_peak_bytes
    change = f"{(after - before) / before:+.1%}" if before else "no change"
    basis = "read from the final schedule" if graph.certified else "modelled"
    yield "peak", f"{format_bytes(before)} → {format_bytes(after)} ({change}; {basis})"
    yield "budget", _budget_text(graph)
    if graph.held_bytes:
        yield "held", f"{format_bytes(graph.held_bytes)} by earlier graphs of the step"
    if graph.training:
        yield "saved", f"{format_bytes(graph.saved_bytes)} from forward to backward"
        share = graph.recompute_seconds / graph.forward_seconds if graph.forward_seconds else 0.0
        yield (
            "recompute",
            f"{format_seconds(graph.recompute_seconds)} a step"
            + (f", {share:.1%} of the forward" if share and math.isfinite(share) else ""),
        )
        if graph.host_bytes or graph.file_bytes:
            files = f", {format_bytes(graph.file_bytes)} in files" if graph.file_bytes else ""
            waits = f"waited for {format_seconds(graph.stall_seconds)} a step"
            yield "on the host", f"{format_bytes(graph.host_bytes)}{files}, {waits}"
        counts, sizes = Counter[str](), Counter[str]()
        for row in graph.decisions:
            counts[row.kind] += 1
            sizes[row.kind] += row.nbytes
        kinds = [f"{counts[kind]} {kind} ({format_bytes(sizes[kind])})" for kind in sorted(counts)]
        yield "decisions", ", ".join(kinds) or "none"
    rewrites = [f"{name} {count}" for name, count in sorted(graph.rewrites.items()) if count]
    yield "rewrites", ", ".join(rewrites) or "none"
    yield "planning", f"{format_seconds(graph.planning_seconds)}, {graph.solver}"


def _budget_text(graph: GraphRecord) -> str:
    budget, peak = graph.budget_bytes, graph.predicted_peak_bytes
    if budget is None:
        bounds = graph.training or graph.budget == "none"
        return graph.budget if bounds else f"{graph.budget}: nothing to plan in inference"
    if peak <= budget:
        return f"{format_bytes(budget)} (met, {format_bytes(budget - peak)} to spare)"
    return f"{format_bytes(budget)} (exceeded by {format_bytes(peak - budget)})"


def _decision_table(rows: Sequence[DecisionRow]) -> Table:
    """Values of one operator on one line, decided alike, are one row: repeated blocks."""
    groups: dict[tuple[str, str, str], list[DecisionRow]] = {}
    for row in sorted(rows, key=lambda row: (-row.nbytes, row.name)):
        groups.setdefault((row.kind, row.op, row.source), []).append(row)
    ranked = sorted(groups.items(), key=lambda group: -sum(row.nbytes for row in group[1]))
    table = _table("largest decisions", len(ranked) - _MOST_DECISIONS)
    for heading in ("decision", "value", "operator", "source"):
        table.add_column(heading, overflow="fold")
    table.add_column("bytes", justify="right", no_wrap=True)
    table.add_column("to remake", justify="right", no_wrap=True)
    for (kind, op, source), alike in ranked[:_MOST_DECISIONS]:
        name = alike[0].name + (f" (x{len(alike)})" if len(alike) > 1 else "")
        size = format_bytes(sum(row.nbytes for row in alike))
        cost = format_seconds(sum(row.seconds for row in alike))
        table.add_row(*map(Text, (kind, name, op, _short_source(source), size, cost)))
    return table


def _remark_table(remarks: Sequence[Remark]) -> Table:
    """Remarks that differ in their node only are one row, with the number of nodes."""
    groups: dict[tuple[str, RemarkKind, str], list[Remark]] = {}
    for remark in remarks:
        groups.setdefault((remark.pass_name, remark.kind, remark.text), []).append(remark)
    order = list(RemarkKind)
    ranked = sorted(groups.items(), key=lambda group: order.index(group[0][1]))
    table = _table("remarks", len(ranked) - _MOST_REMARKS)
    for heading in ("kind", "pass"):
        table.add_column(heading, no_wrap=True)
    table.add_column("statement", ratio=1, overflow="fold")
    table.add_column("where", overflow="fold")
    for (name, kind, text), said in ranked[:_MOST_REMARKS]:
        statement = f"{text} (x{len(said)})" if len(said) > 1 else text
        style = _KIND_STYLES[kind]
        table.add_row(Text(kind.value, style=style), Text(name), Text(statement), _where(said))
    return table


def _where(said: Sequence[Remark]) -> Text:
    places = list(dict.fromkeys(_short_source(r.source) or r.node for r in said))
    more = f" and {len(places) - 1} more" if len(places) > 1 else ""
    return Text(places[0] + more)


def _table(title: str, left_out: int) -> Table:
    caption = f"and {left_out} more; report.save() shows all" if left_out > 0 else None
    return Table(
        title=title, title_justify="left", title_style="bold", caption=caption,
        caption_justify="left", box=None, pad_edge=True, header_style="dim",
    )  # fmt: skip


def _short_source(source: str) -> str:
    """The last folder, the file and the line: what tells two sources apart at a glance."""
    return "/".join(re.split(r"[\\/]", source)[-2:])
