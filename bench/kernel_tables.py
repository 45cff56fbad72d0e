"""Tables of what `bench.kernels` measured."""

from collections.abc import Iterable, Sequence
from typing import Any

from bench.tables import markdown

Row = dict[str, Any]
_COUNTED = ("dram_bytes", "l2_bytes")
_TRAFFIC = """\
Bytes in the tracer over those of a kernel that reads every argument once and writes every result
once: **DRAM** if the shared cache keeps everything, **L2** if nothing is kept close to a
processor. Beside them liger-kernel on the same arguments: one kernel of its own, or what a model
that uses it runs for the same work, where dropout is torch's. Torch's operators are counted as
eager runs them, in ours and in liger's: each reads what it is given once, and writes its result
once. The lines are the usual arguments of each kernel, and those that liger takes in another way.

Liger reads one half of rotary tables that hold each angle twice. Memopt reads what it is given, so
its first line is of views of the half. On the CPU both sum a weight's gradient in one program, on
a GPU in one for each processor, which writes a row of sums.
"""
_CODE = """\
The usual launches compiled for GPUs that are not there, the most of each function: registers of a
thread · bytes that it spills · bytes of shared memory of a block · loads of 128 bits among all
from device memory, where they are the smallest share.
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
    columns = (
        "kernel", "arguments", "ideal KiB", "DRAM", "L2", "liger's", "its DRAM", "its L2"
    )  # fmt: skip
    lines = []
    for key, peers in by_sample(rows).items():
        ours, theirs = peers["memopt"], peers.get("liger", {})
        cells = [_ratio(row, name) for row in (ours, theirs) for name in _COUNTED]
        cells.insert(2, (theirs.get("form") or "one kernel") if _COUNTED[0] in theirs else "-")
        lines.append([*key, f"{ours['ideal_bytes'] / 1024:.1f}", *cells])
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
    """One line per function, one column per target."""
    found: dict[str, dict[str, list[Row]]] = {}
    for row in rows:
        found.setdefault(row["function"], {}).setdefault(row["target"], []).append(row)
    targets = list(dict.fromkeys(target for line in found.values() for target in line))
    names = [f"sm_{target}" if target.isdigit() else target for target in targets]
    lines = [
        [function, *(_code(line[t]) if t in line else "-" for t in targets)]
        for function, line in found.items()
    ]
    return markdown(("function", *names), lines)


def _code(rows: Sequence[Row]) -> str:
    """The most of all launches of one function for one target."""
    failed = [row["status"] for row in rows if row["status"] != "ok"]
    if failed:
        return str(failed[0])
    most = (
        max(row[name] for row in rows) for name in ("registers", "spilled_bytes", "shared_bytes")
    )
    least = min(rows, key=lambda row: row["vector_loads"] / max(1, row["loads"]))
    return " · ".join([*map(str, most), f"{least['vector_loads']}/{least['loads']}"])


def compared(rows: Iterable[Row]) -> dict[tuple[str, str], dict[str, Row]]:
    """The rows with bytes of every kernel and sample that liger has too, by peer."""
    counted = by_sample(row for row in rows if _COUNTED[0] in row)
    return {key: peers for key, peers in counted.items() if "liger" in peers}


def by_sample(rows: Iterable[Row]) -> dict[tuple[str, str], dict[str, Row]]:
    """The rows of every kernel and sample, by peer."""
    found: dict[tuple[str, str], dict[str, Row]] = {}
    for row in rows:
        found.setdefault((row["kernel"], row["sample"]), {})[row["peer"]] = row
    return found


def _ratio(row: Row, name: str) -> str:
    return f"{row[name] / row['ideal_bytes']:.3f}" if name in row else "-"
