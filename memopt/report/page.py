"""The report as a page and as a picture: live bytes over the step, and who holds them."""

import json
import math
import re
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from memopt._versions import __version__
from memopt.errors import ConfigError, MissingExtraError
from memopt.memory.timeline import Timeline
from memopt.record import DecisionRow, GraphRecord
from memopt.units import format_bytes

_SCRIPTS = ("report.js", "timeline.js", "compare.js")
_BODY = re.compile(r'<script type="application/json" id="report">(.*?)</script>', re.DOTALL)
_KEYS = {"version", "name", "graphs", "predicted_peak_bytes"}
_MOST_PANELS = 6
# A budget this far above every curve would flatten them; it is written down, not drawn.
_BUDGET_HEADROOM = 1.6
# Okabe and Ito's palette, readable with any colour vision; the dashes say the same once more.
_STYLES: dict[str, tuple[str, str]] = {
    "everything kept": ("#6e7781", ":"),
    "stock partition": ("#d55e00", "--"),
    "plan": ("#0072b2", "-"),
}
_OTHER_STYLE = ("#009e73", "-.")


def page_body(
    summary: dict[str, Any], graphs: Sequence[GraphRecord], name: str = ""
) -> dict[str, Any]:
    """What a page shows, as plain JSON types.

    Args:
        summary: ``Report.to_dict()``, one entry in ``"graphs"`` for each of ``graphs``.
        graphs: the records that hold the decisions and timelines.
        name: of the report, where two are side by side.
    """
    panels = [
        {
            **shown,
            "rows": [_decision_cells(row) for row in graph.decisions],
            "timelines": [timeline.to_dict() for timeline in graph.timelines],
        }
        for shown, graph in zip(summary["graphs"], graphs, strict=True)
    ]
    return {**summary, "name": name, "graphs": panels}


def render_page(body: dict[str, Any], beside: dict[str, Any] | None = None) -> str:
    """Fill the page template.

    Args:
        body: of the page, from ``page_body``.
        beside: another one, to be shown beside it.

    Returns:
        One self-contained HTML document, which loads nothing from anywhere.
    """
    shown = {**body, "beside": {**beside, "beside": None}} if beside else body
    parts = {
        "style": _read("report.css"),
        "script": "\n".join(_read(name) for name in _SCRIPTS),
        "report": _embeddable_json(shown),
    }
    # In one go: what looks like a mark in a name is none.
    return re.sub(r"\{\{(\w+)\}\}", lambda mark: parts[mark[1]], _read("report.html"))


def read_page(path: Path) -> dict[str, Any]:
    """The body of a page that was written before.

    Raises:
        ConfigError: there is no such file, or it is no page of this version of memopt.
    """
    remedy = "report.save() writes one, and so does --html"
    try:
        page = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read the page {str(path)!r}: {error}; {remedy}") from error
    found = _BODY.search(page)
    try:
        body = json.loads(found[1]) if found else None
    except (ValueError, RecursionError):
        body = None
    if not isinstance(body, dict) or _KEYS - body.keys():
        raise ConfigError(f"{str(path)!r} is no page of memopt: {remedy}")
    if body["version"] != __version__:
        raise ConfigError(
            f"{str(path)!r} was written by memopt {body['version']}, and this is {__version__}: "
            "make it anew"
        )
    return body


def draw_picture(graphs: Sequence[GraphRecord], path: Path) -> None:
    """Draw one panel for each graph, the highest peaks first if there are too many.

    Args:
        graphs: the records to draw.
        path: where to write; the suffix chooses the format.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingExtraError(
            "report.plot() draws with matplotlib, which is not installed; run: "
            "pip install 'memopt[plot]', or use report.save('timeline.html'), which needs nothing"
        ) from error
    ranked = sorted(range(len(graphs)), key=lambda i: -graphs[i].predicted_peak_bytes)
    shown = [graphs[i] for i in sorted(ranked[:_MOST_PANELS])]
    figure = Figure(figsize=(10, 0.6 + 4.2 * max(len(shown), 1)), layout="constrained")
    if not shown:
        figure.text(0.5, 0.5, "no graph was compiled", ha="center", va="center", color="#57606a")
    elif len(shown) < len(graphs):
        figure.suptitle(f"the {len(shown)} highest peaks of {len(graphs)} graphs", fontsize=11)
    for index, graph in enumerate(shown):
        _draw_graph(figure.add_subplot(len(shown), 1, index + 1), graph)
    figure.savefig(path, dpi=150, metadata={"Date": None} if path.suffix == ".svg" else None)


def split_step(timeline: Timeline) -> int:
    """Index of the first backward step; the number of steps where there is none."""
    return next((i for i, s in enumerate(timeline.steps) if s.backward), len(timeline.steps))


def _decision_cells(row: DecisionRow) -> list[object]:
    seconds = row.seconds if math.isfinite(row.seconds) else None
    return [row.kind, row.name, row.op, row.nbytes, seconds, row.source]


def _read(name: str) -> str:
    return resources.files("memopt.report").joinpath(name).read_text(encoding="utf-8")


def _embeddable_json(value: object) -> str:
    """JSON that no HTML parser can mistake for markup, in ASCII (so U+2028 is escaped too)."""
    text = json.dumps(value, separators=(",", ":"), allow_nan=False)
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def _draw_graph(axes: Any, graph: GraphRecord) -> None:
    """One panel: the curves, the budget, the turn from forward to backward, the peaks.

    The horizontal axis counts the steps of the last timeline, the plan; the halves of the others
    are stretched to its halves, so that the ends of all forwards coincide.
    """
    highest = max((t.peak_bytes for t in graph.timelines), default=0)
    budget = graph.budget_bytes
    fits = budget is not None and budget <= max(highest, 1) * _BUDGET_HEADROOM
    top = max(highest, budget if budget is not None and fits else 0, 1) * 1.16
    scale, unit = _unit(top)
    title = f"{graph.id}: peak {format_bytes(graph.predicted_peak_bytes)}"
    if graph.predicted_peak_bytes != graph.baseline_peak_bytes:
        title += f", {format_bytes(graph.baseline_peak_bytes)} with everything kept"
    if budget is not None and not fits:
        title += f", budget {format_bytes(budget)} (above the picture)"
    pad = 26 if graph.timelines else 6
    axes.set_title(title, loc="left", fontsize=11, pad=pad, parse_math=False)
    for timeline in graph.timelines:
        _draw_curve(axes, timeline, graph.timelines[-1], scale)
    if budget is not None and fits:
        axes.axhline(
            budget / scale, color="#24292f", linewidth=1.1, dashes=(6, 3),
            label=f"budget {format_bytes(budget)}",
        )  # fmt: skip
    _draw_halves(axes, graph.timelines)
    axes.set_ylim(0, top / scale)
    axes.set_ylabel(f"live bytes [{unit}]")
    axes.grid(axis="y", color="#d0d7de", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(
            frameon=False, fontsize=9, loc="lower left", bbox_to_anchor=(-0.01, 0.99), ncols=4,
            borderaxespad=0.2, handlelength=2.4, columnspacing=1.4,
        )  # fmt: skip


def _draw_curve(axes: Any, timeline: Timeline, reference: Timeline, scale: float) -> None:
    live = timeline.live_bytes
    if not live:
        return
    colour, dashes = _STYLES.get(timeline.label, _OTHER_STYLE)
    edges = _edges(timeline, reference)
    heights = [nbytes / scale for nbytes in live]
    axes.stairs(
        heights, edges, baseline=None, color=colour, linestyle=dashes, linewidth=1.6,
        label=f"{timeline.label}, peak {format_bytes(timeline.peak_bytes)}",
    )  # fmt: skip
    at = timeline.peak_step
    middle = (edges[at] + edges[at + 1]) / 2
    axes.plot(middle, heights[at], "o", color=colour, markersize=5)
    if timeline is reference:
        axes.stairs(heights, edges, fill=True, color=colour, alpha=0.12)
        axes.annotate(
            format_bytes(live[at]), (middle, heights[at]), textcoords="offset points",
            xytext=(0, 6), ha="center", fontsize=9, color=colour, fontweight="bold",
            bbox={"facecolor": "white", "alpha": 0.8, "edgecolor": "none", "pad": 0.6},
        )  # fmt: skip


def _draw_halves(axes: Any, timelines: Sequence[Timeline]) -> None:
    if not timelines or not timelines[-1].steps:
        axes.set_xticks([])
        return
    turn, end = split_step(timelines[-1]), len(timelines[-1].steps)
    axes.set_xlim(0, end)
    axes.set_xlabel(f"step of the {timelines[-1].label}")
    if 0 < turn < end:
        axes.axvline(turn, color="#8c959f", linewidth=0.9)
    halves = (("forward", 0, turn), ("backward", turn, end))
    for name, first, last in halves if turn < end else ():
        if first < last:
            axes.text(
                (first + last) / 2, 0.985, name, transform=axes.get_xaxis_transform(),
                ha="center", va="top", fontsize=9, color="#57606a",
            )  # fmt: skip


def _edges(timeline: Timeline, reference: Timeline) -> list[float]:
    """Where each step begins, and the last one ends, on the reference's step axis."""
    turn, end = split_step(timeline), len(timeline.steps)
    to_turn, to_end = split_step(reference), len(reference.steps)
    if turn == end:
        to_turn = to_end
    forward = [to_turn * i / turn for i in range(turn)]
    backward = [to_turn + (to_end - to_turn) * i / (end - turn) for i in range(end - turn)]
    return [*forward, *backward, float(to_end)]


def _unit(top: float) -> tuple[float, str]:
    for power, unit in ((4, "TiB"), (3, "GiB"), (2, "MiB"), (1, "KiB")):
        if top >= 2 * 1024**power:
            return float(1024**power), unit
    return 1.0, "B"
