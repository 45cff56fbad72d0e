"""Tables of what `bench.kernels` measured."""

from collections.abc import Iterable
from typing import Any

from bench.tables import markdown

Row = dict[str, Any]
_TRAFFIC = """\
Bytes in the tracer over those of a kernel that reads every argument once and writes every
result once: **DRAM** if the shared cache keeps everything, **L2** if nothing is kept close to a
processor. Liger's launches are on the same arguments; what torch does around a launch is in no
figure. On the CPU liger sums a weight's gradient in one program, and memopt in a few, as on a GPU
both do in hundreds: each writes a row of sums.
"""
_CODE = """\
The same launches compiled for GPUs that are not there: registers of a thread · bytes that it
spills · bytes of shared memory of a block · loads of 128 bits among all from device memory.
"""
_SPEED = """\
Median microseconds with a cold cache; of the others, how many times ours they take.
"""


def kernel_section(rows: Iterable[Row]) -> str:
    """All tables of a results file's rows; empty without kernels."""
    done = [row for row in rows if row["kind"].startswith("kernel_") and "kernel" in row]
    parts = []
    for kind, text, table in (
        ("kernel_traffic", _TRAFFIC, traffic_table),
        ("kernel_speed", _SPEED, speed_table),
        ("kernel_code", _CODE, code_table),
    ):
        if own := [row for row in done if row["kind"] == kind]:
            parts += [text, table(own)]
    return "\n".join(parts)


def traffic_table(rows: Iterable[Row]) -> str:
    """One line per kernel and sample."""
    columns = ("kernel", "arguments", "ideal KiB", "DRAM", "L2", "liger DRAM", "liger L2")
    lines = [
        [
            *key,
            f"{peers['memopt']['ideal_bytes'] / 1024:.1f}",
            *(
                _ratio(peers.get(peer), name)
                for peer in ("memopt", "liger")
                for name in ("dram_bytes", "l2_bytes")
            ),
        ]
        for key, peers in by_sample(rows).items()
    ]
    return markdown(columns, lines)


def speed_table(rows: Iterable[Row]) -> str:
    """One line per kernel and sample."""
    others = ("eager", "inductor", "liger")
    columns = ("kernel", "arguments", "us", *(f"{peer} / ours" for peer in others))
    lines = []
    for key, peers in by_sample(rows).items():
        ours = peers["memopt"]["seconds"]
        cells = [
            f"{peers[peer]['seconds'] / ours:.2f}" if "seconds" in peers.get(peer, {}) else "-"
            for peer in others
        ]
        lines.append([*key, f"{1e6 * ours:.1f}", *cells])
    return markdown(columns, lines)


def code_table(rows: Iterable[Row]) -> str:
    """One line per launch, one column per target."""
    cells: dict[tuple[str, str], dict[str, str]] = {}
    for row in rows:
        cells.setdefault((row["function"], row["sample"]), {})[row["target"]] = _code(row)
    targets = list(dict.fromkeys(target for line in cells.values() for target in line))
    names = [f"sm_{target}" if target.isdigit() else target for target in targets]
    lines = [[*key, *(line.get(t, "-") for t in targets)] for key, line in cells.items()]
    return markdown(("function", "arguments", *names), lines)


def _code(row: Row) -> str:
    if row["status"] != "ok":
        return str(row["status"])
    figures = (row[name] for name in ("registers", "spilled_bytes", "shared_bytes"))
    return " · ".join([*map(str, figures), f"{row['vector_loads']}/{row['loads']}"])


def by_sample(rows: Iterable[Row]) -> dict[tuple[str, str], dict[str, Row]]:
    """The rows of every kernel and sample, by peer."""
    found: dict[tuple[str, str], dict[str, Row]] = {}
    for row in rows:
        found.setdefault((row["kernel"], row["sample"]), {})[row["peer"]] = row
    return found


def _ratio(row: Row | None, name: str) -> str:
    return "-" if row is None or name not in row else f"{row[name] / row['ideal_bytes']:.3f}"
