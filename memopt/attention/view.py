"""A plan of spans as a table, and as a picture."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from memopt.attention.layers import LayerSpans, LengthLoss, computed, density
from memopt.errors import MissingExtraError

_SCALES = "viridis"


def layer_table(layers: Sequence[LayerSpans], longest: int) -> Table:
    """One row for each layer: the spans of its heads of keys at one length, and their errors."""
    table = Table(box=None, header_style="dim", pad_edge=False)
    table.add_column("layer", overflow="fold")
    table.add_column("rules", overflow="fold")
    table.add_column(f"spans of {longest} tokens, by head of keys", overflow="fold")
    table.add_column("worst error", justify="right", no_wrap=True)
    for layer in layers:
        if not layer.rules:
            table.add_row(layer.name, "not causal self-attention: left alone", "", "")
            continue
        rules = ", ".join(map(repr, dict.fromkeys(layer.rules)))
        spans = " ".join(map(str, layer.spans(longest)))
        table.add_row(layer.name, rules, spans, f"{max(layer.errors, default=0.0):.1e}")
    return table


def length_table(layers: Sequence[LayerSpans], sinks: int, losses: Sequence[LengthLoss]) -> Table:
    """One row for each length of held-out sequences."""
    table = Table(box=None, header_style="dim", pad_edge=False)
    for heading in ("length", "keys read", "entries computed", "full loss", "sparse", "change"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in losses:
        table.add_row(
            str(row.length),
            f"{density(layers, sinks, row.length):.1%}",
            f"{computed(layers, sinks, row.length):.1%}",
            f"{row.full:.4f}",
            f"{row.sparse:.4f}",
            f"{row.change:+.2%}",
        )
    return table


def draw(layers: Sequence[LayerSpans], losses: Sequence[LengthLoss], path: Path) -> None:
    """Draw the span and the error of every head of keys, and the loss at every length.

    Args:
        layers: those with rules are drawn.
        losses: one for each length of held-out sequences.
        path: where to write; the suffix chooses the format.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingExtraError(
            "plot() needs matplotlib, which is not installed: pip install 'memopt[plot]'"
        ) from error
    ruled = [layer for layer in layers if layer.rules]
    longest = max(row.length for row in losses)
    spans = [[span / longest for span in layer.spans(longest)] for layer in ruled]
    figure = Figure(figsize=(11, 1.8 + 0.28 * max(6, len(ruled))), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    left, middle, right = figure.subplots(1, 3)
    _map(left, ruled, spans, f"share of {longest} tokens that a head sees", figure, 1.0)
    _map(middle, ruled, [list(layer.errors) for layer in ruled], "error of its output", figure)
    _losses(right, losses)
    figure.savefig(path)


def _map(
    axes: Any,
    layers: Sequence[LayerSpans],
    values: list[list[float]],
    title: str,
    figure: Any,
    top: float | None = None,
) -> None:
    """Layers down, heads of keys to the right; layers with fewer heads end earlier."""
    most = max(map(len, values))
    rows = [row + [float("nan")] * (most - len(row)) for row in values]
    image = axes.imshow(rows, aspect="auto", cmap=_SCALES, vmin=0.0, vmax=top)
    axes.set_title(title, fontsize=9)
    axes.set_xlabel("head of keys")
    axes.set_xticks(range(most))
    axes.set_yticks(range(len(layers)), [layer.name for layer in layers], fontsize=6)
    figure.colorbar(image, ax=axes)


def _losses(axes: Any, losses: Sequence[LengthLoss]) -> None:
    lengths = [row.length for row in losses]
    axes.plot(lengths, [row.full for row in losses], "s-", color="#000000", label="full")
    axes.plot(lengths, [row.sparse for row in losses], "o-", color="#d55e00", label="sparse")
    axes.set_title("loss of held-out sequences", fontsize=9)
    axes.set_xlabel("tokens")
    axes.set_ylim(bottom=0)
    axes.grid(color="#dddddd", linewidth=0.6)
    axes.legend(fontsize=8, frameon=False)
