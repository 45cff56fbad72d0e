"""What ``explain`` returns: the record of every compiled graph, to print, save, plot or read."""

import io
import json
import math
import os
from collections import Counter
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from rich.console import Console, ConsoleOptions, RenderResult
from rich.text import Text

from memopt._versions import __version__
from memopt.paths import checked_path
from memopt.record import GraphRecord
from memopt.report.page import draw_picture, page_body, read_page, render_page
from memopt.report.text import graph_parts
from memopt.units import format_bytes


@dataclass(frozen=True, repr=False)
class Report:
    """What was done to each graph of a step, to which line, for how many bytes and seconds.

    Attributes:
        graphs: one record per compiled graph, in the order in which they were compiled.
        gradient_error: how far the gradient was from the exact one on the inputs that were
            explained, over its norm; None where every form is exact.
    """

    graphs: tuple[GraphRecord, ...]
    gradient_error: float | None = None

    @property
    def predicted_peak_bytes(self) -> int:
        """The highest peak of any graph; with a budget in bytes, above what earlier ones hold."""
        return max((g.predicted_peak_bytes + g.held_bytes for g in self.graphs), default=0)

    def to_dict(self) -> dict[str, Any]:
        """The report without its timelines, as plain JSON types."""
        return {
            "version": __version__,
            "predicted_peak_bytes": self.predicted_peak_bytes,
            "gradient_error": self.gradient_error,
            "graphs": [_graph_dict(graph) for graph in self.graphs],
        }

    def to_json(self, *, indent: int | None = 2) -> str:
        """``to_dict`` as JSON text."""
        return json.dumps(self.to_dict(), indent=indent, allow_nan=False)

    def save(
        self,
        path: str | os.PathLike[str] = "timeline.html",
        *,
        beside: "Report | str | os.PathLike[str] | None" = None,
    ) -> Path:
        """Write one self-contained page: the timelines, the decisions and the remarks.

        Args:
            path: a file that ends in ``.html``; one that exists is replaced.
            beside: another report, or the path of a page that was saved by this version: the
                page then compares the two, that one as A and this one as B.

        Returns:
            The path that was written.

        Raises:
            ConfigError: the suffix is another one, the folder does not exist, or ``beside`` is
                no such page.
        """
        target = checked_path(path, ("html", "htm"))
        other = None
        if isinstance(beside, Report):
            other = beside._page_body()
        elif beside is not None:
            other = read_page(Path(beside))
        target.write_text(render_page(self._page_body(target.stem), other), encoding="utf-8")
        return target

    def _page_body(self, name: str = "") -> dict[str, Any]:
        return page_body(self.to_dict(), self.graphs, name)

    def plot(self, path: str | os.PathLike[str] = "timeline.png") -> Path:
        """Draw live bytes over the step, a panel for each graph.

        Args:
            path: a file that ends in ``.png``, ``.svg`` or ``.pdf``; one that exists is replaced.

        Returns:
            The path that was written.

        Raises:
            ConfigError: the suffix is another one, or the folder does not exist.
            MissingExtraError: matplotlib is not installed.
        """
        target = checked_path(path, ("png", "svg", "pdf"))
        draw_picture(self.graphs, target)
        return target

    def print(self) -> None:
        """Print the report to the terminal, as wide as it is and in its colours."""
        Console().print(self)

    @property
    def _headline(self) -> str:
        if not self.graphs:
            return "no graph was compiled"
        noun = "1 graph" if len(self.graphs) == 1 else f"{len(self.graphs)} graphs"
        rounded = (
            ""
            if self.gradient_error is None
            else f", gradient off by {self.gradient_error:.1e} of its norm"
        )
        return f"{noun}, predicted peak {format_bytes(self.predicted_peak_bytes)}{rounded}"

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield Text(f"memopt: {self._headline}", style="bold")
        for graph in self.graphs:
            yield from graph_parts(graph)

    def __str__(self) -> str:
        console = Console(file=io.StringIO(), width=110, color_system=None, force_terminal=False)
        with console.capture() as capture:
            console.print(self)
        return "\n".join(line.rstrip() for line in capture.get().splitlines())

    def __repr__(self) -> str:
        return f"<Report: {self._headline}>"

    def _repr_html_(self) -> str:
        page = escape(render_page(self._page_body()))
        return (
            f'<iframe srcdoc="{page}" title="memopt report" '
            'style="width:100%;height:900px;border:0"></iframe>'
        )


def _graph_dict(graph: GraphRecord) -> dict[str, Any]:
    return {
        "id": graph.id,
        "training": graph.training,
        "lowering": graph.lowering,
        "baseline_peak_bytes": graph.baseline_peak_bytes,
        "predicted_peak_bytes": graph.predicted_peak_bytes,
        "certified": graph.certified,
        "budget": graph.budget,
        "budget_bytes": graph.budget_bytes,
        "held_bytes": graph.held_bytes,
        "saved_bytes": graph.saved_bytes,
        "recompute_seconds": _finite(graph.recompute_seconds),
        "forward_seconds": _finite(graph.forward_seconds),
        "step_seconds": _finite(graph.step_seconds),
        "baseline_step_seconds": _finite(graph.baseline_step_seconds),
        "host_bytes": graph.host_bytes,
        "file_bytes": graph.file_bytes,
        "stall_seconds": _finite(graph.stall_seconds),
        "planning_seconds": _finite(graph.planning_seconds),
        "solver": graph.solver,
        "decisions": dict(sorted(Counter(row.kind for row in graph.decisions).items())),
        "rewrites": dict(sorted(graph.rewrites.items())),
        "remarks": [remark.to_dict() for remark in graph.remarks],
    }


def _finite(seconds: float) -> float | None:
    return seconds if math.isfinite(seconds) else None
