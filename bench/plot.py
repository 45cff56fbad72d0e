"""Pictures and pages from results files."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot

from bench import comparison, tables
from bench.attention import attention_section
from bench.caches import caches_section
from bench.compare import Rows, step_rows
from bench.fsdp2 import fsdp2_section
from bench.kernel_tables import compared, kernel_section
from bench.plan_tables import plan_section
from bench.results import load

MIB = 2**20
# Okabe and Ito's palette, safe for colour-blind readers; the markers tell the families apart too.
FAMILIES = (
    ("memopt", "memopt", "#D55E00", "o"),
    ("eager+checkpoint", "eager, checkpoint per block", "#009E73", "^"),
    ("eager", "eager", "#000000", "s"),
    ("inductor+checkpoint", "Inductor, checkpoint per block", "#56B4E9", "v"),
    ("inductor+selective", "Inductor, selective checkpoint", "#E69F00", "<"),
    ("inductor ", "Inductor, activation budget", "#CC79A7", "D"),
    ("inductor", "Inductor", "#0072B2", "P"),
)


def write_all(files: Sequence[Path], root: Path) -> list[Path]:
    """Write one picture per case, ``docs/results.md``, and the tables of other pages.

    Those are the tables of ``docs/comparison.md``, if it is there, and the README's, if it has
    markers.

    Returns:
        The files written.
    """
    loaded = [(path.stem, load(path)) for path in files]
    assets = root / "docs" / "assets"
    assets.mkdir(parents=True, exist_ok=True)
    written = []
    pages = ["# Results\n", tables.introduction([results for _, results in loaded])]
    for stem, results in loaded:
        pictures, page = _section(stem, results, assets)
        written += pictures
        pages.append(page)
    page_path = root / "docs" / "results.md"
    page_path.write_text("\n".join(pages))
    written.append(page_path)
    beside = root / "docs" / "comparison.md"
    if beside.exists():
        beside.write_text(comparison.fill(beside.read_text(), loaded))
        written.append(beside)
    readme = root / "README.md"
    if readme.exists() and tables.START in readme.read_text():
        table = tables.readme_table(results for _, results in loaded)
        readme.write_text(tables.put_between_markers(readme.read_text(), table))
        written.append(readme)
    return written


def _section(stem: str, results: dict[str, Any], assets: Path) -> tuple[list[Path], str]:
    """The pictures of one results file, and its part of the page."""
    rows = step_rows(results)
    pictures, parts = [], [f"## {stem}\n", tables.environment(results)]
    for case in dict.fromkeys(key[0] for key in rows):
        row = next(row for key, row in rows.items() if key[0] == case)
        parts.append(f"### {case}\n")
        parts.append(tables.about(row))
        picture = _picture(rows, case, assets / f"{stem}_{case}.png")
        if picture:
            pictures.append(picture)
            parts.append(f"![Peak against step time, {case}](assets/{picture.name})\n")
        parts.append(tables.case_table(rows, case))
    startup = tables.startup_table(results)
    if startup:
        parts += ["### Compile time, 32-layer Llama\n", startup]
    if section := kernel_section(results["rows"]):
        parts.append("### kernels\n")
        picture = _kernel_picture(results["rows"], assets / f"{stem}_kernels.png")
        if picture:
            pictures.append(picture)
            parts.append(f"![Bytes moved by each kernel](assets/{picture.name})\n")
        parts.append(section)
    if section := attention_section(results["rows"]):
        parts += ["### banded attention\n", section]
    if section := caches_section(results["rows"]):
        parts += ["### caches\n", section]
    if section := fsdp2_section(results["rows"]):
        parts += ["### sharded blocks on several ranks\n", section]
    if section := plan_section(results["rows"]):
        parts += ["### plans\n", section]
    return pictures, "\n".join(parts)


def _picture(rows: Rows, case: str, path: Path) -> Path | None:
    """Peak against step time; None if fewer than two peers have both."""
    points: dict[str, list[tuple[float, float]]] = {}
    for (name, peer), row in rows.items():
        if name == case and row["peak_bytes"] and row["step_seconds"]:
            family = next(f[0] for f in FAMILIES if peer.startswith(f[0]))
            points.setdefault(family, []).append((row["step_seconds"], row["peak_bytes"] / MIB))
    if sum(map(len, points.values())) < 2:
        return None
    figure, axes = pyplot.subplots(figsize=(6.4, 4.2), dpi=150, layout="constrained")
    for family, label, colour, marker in FAMILIES:
        if family not in points:
            continue
        seconds, mib = zip(*sorted(points[family]), strict=True)
        line = "-" if family == "memopt" else "none"
        axes.plot(
            seconds,
            mib,
            linestyle=line,
            marker=marker,
            color=colour,
            label=label,
            markersize=7,
            alpha=0.9,
        )
    axes.set_xlabel("step time, seconds (median)")
    axes.set_ylabel("peak of the step, MiB")
    axes.set_title(case)
    axes.set_ylim(bottom=0)
    axes.grid(color="#DDDDDD", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.legend(fontsize=8, frameon=False)
    figure.savefig(path)
    pyplot.close(figure)
    return path


def _kernel_picture(rows: Sequence[dict[str, Any]], path: Path) -> Path | None:
    """Bytes of kernels, ours and liger's, over those that must move; None if none were counted."""
    samples = compared(rows)
    if not samples:
        return None
    height = 1.0 + 0.45 * len(samples)
    figure, axes = pyplot.subplots(figsize=(8.0, height), dpi=150, layout="constrained")
    for place, (peer, colour) in enumerate((("memopt", "#D55E00"), ("liger", "#009E73"))):
        found = [(y, each[peer]) for y, each in enumerate(samples.values()) if peer in each]
        for figures, alpha in (("l2", 0.4), ("dram", 1.0)):
            axes.barh(
                [y + 0.36 * place for y, _ in found],
                [row[f"{figures}_bytes"] / row["ideal_bytes"] for _, row in found],
                height=0.34,
                color=colour,
                alpha=alpha,
                label=f"{peer}, {figures.upper()}",
            )
    names = [
        f"{kernel.removeprefix('memopt::')} / {each['liger'].get('form') or 'one kernel'}\n{about}"
        for (kernel, about), each in samples.items()
    ]
    axes.set_yticks([y + 0.18 for y in range(len(names))], names, fontsize=5)
    axes.invert_yaxis()
    axes.axvline(1.0, color="#000000", linewidth=0.8)
    axes.set_xlabel("bytes moved / bytes of arguments and results")
    figure.legend(fontsize=8, frameon=False, ncols=4, loc="outside upper right")
    figure.savefig(path)
    pyplot.close(figure)
    return path
