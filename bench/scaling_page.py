"""The page of FSDP2 on many ranks, and its picture, from a results file."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot

from bench.scaling import USABLE, WAYS
from bench.sharding import Fabric, Training
from bench.tables import environment, markdown
from memopt.device import DEVICES

Row = dict[str, Any]
_COLOURS = {"stock": "#0072B2", "checkpoint": "#009E73", "memopt": "#D55E00"}
_LABELS = {
    "stock": "torch's partition",
    "checkpoint": "a checkpoint for each block",
    "memopt": "memopt, in the memory that is left",
}
_HOW_TO_READ = """\
What memopt's planner says of `fully_shard` on many {device}s, computed on a machine without one:
nothing here was run on GPUs. The graph of one block, as one of all that the model has
(`repeats`), and that of head and loss are planned on fake tensors; their bytes and seconds go
into the formulas of `bench/sharding.py`. Three ways to run a block:

- **stock**: torch's own partition of the block's graph, with no pass of memopt's.
- **checkpoint**: the same graph, and nothing of a block kept but what it is given.
- **memopt**: the budget is what parameters and their like leave of a rank's memory, so the plan
  is another one for each number of ranks. Head and loss are memopt's as well, by chunks; in the
  other two ways they are torch's.

Of a rank's {gib} GiB, {usable:.0%} is used. A rank holds, in bytes:

| what | how much |
|:--|:--|
| sharded | {state} for each parameter over the ranks: float32, with gradient and two moments |
| gathered | {width} for each parameter of two blocks, and of what is in no block |
| reduced | {reduced} for each parameter of a block, on their way while the next block's are made |
| graphs | the peak that the planner gives for a block beside the others, or the head's |

Seconds of a step, without the optimizer's, which has nothing to do with plans:

- A block's forward and backward are the planner's roofline (`memopt.cost`: the device's dense
  peaks, matrix products at 0.7 of them, attention at 0.4).
- A ring gathers or reduces `bytes * (ranks - 1) / ranks / bandwidth`, and `ranks` hops of
  {inner_hop:g} µs within a node and {outer_hop:g} µs between nodes. Nodes have {node} GPUs of
  {inner:.0f} GB/s each way, and a card of {outer:.0f} GB/s for each GPU: {across:.0f} GB/s at
  most where a ring crosses nodes.
- A block's gather, in the backward also the reduction of the one before, runs beside its
  neighbour's computation, and costs what it takes longer. Nothing runs beside the first gathers
  and the last reduction.

Left out: what kernels lose while a collective uses the same memory, stragglers, and failures.
Every rank has the same batch, so the global batch grows with the ranks.
"""


def page(results: dict[str, Any], picture: str) -> str:
    """The whole page.

    Args:
        results: a results file whose rows are of the kind ``scaling``.
        picture: where the picture lies, seen from the page.
    """
    rows, fabric, training = results["rows"], Fabric(), Training(blocks=1, embedding=0)
    device = DEVICES[rows[0]["planned_for"]]
    words = _HOW_TO_READ.format(
        device=device.name.upper(),
        gib=device.memory_bytes // 2**30,
        usable=USABLE,
        state=training.state_bytes,
        width=training.width_bytes,
        reduced=training.reduced_bytes,
        inner_hop=1e6 * fabric.inner_hop_seconds,
        outer_hop=1e6 * fabric.outer_hop_seconds,
        node=fabric.node,
        inner=fabric.inner / 1e9,
        outer=fabric.outer / 1e9,
        across=min(fabric.inner, fabric.node * fabric.outer) / 1e9,
    )
    when = environment(results).replace("Measured", "Computed", 1)
    parts = ["# Many ranks, computed\n", when, words]
    parts.append(f"![Bytes of a rank, and tokens per second, by ranks]({picture})\n")
    for case in dict.fromkeys(row["case"] for row in rows):
        own = [row for row in rows if row["case"] == case]
        about = f"{own[0]['batch']} x {own[0]['length']} tokens on each rank."
        parts += [f"## {case}\n", about + "\n", _table(own)]
    return "\n".join(parts)


def _table(rows: Sequence[Row]) -> str:
    columns = (
        "ranks", "way", "sharded GB", "gathered GB", "graphs GB", "rank GB", "fits", "run again s",
        "step s", "tokens/s",
    )  # fmt: skip
    lines = [
        [
            str(row["ranks"]),
            row["peer"],
            *(
                f"{row[f'{name}_bytes'] / 1e9:.1f}"
                for name in ("sharded", "gathered", "graph", "rank")
            ),
            "yes" if row["fits"] else "no",
            f"{row['recompute_seconds']:.3f}",
            f"{row['step_seconds']:.3f}" if row["fits"] else "-",
            f"{row['tokens_per_second']:,.0f}" if row["fits"] else "-",
        ]
        for row in rows
    ]
    return markdown(columns, lines)


def draw(rows: Sequence[Row], path: Path) -> None:
    """Bytes of a rank, and tokens per second of what fits, by ranks; a line of panels a model."""
    cases = list(dict.fromkeys(row["case"] for row in rows))
    figure, axes = pyplot.subplots(
        len(cases),
        2,
        figsize=(9.0, 3.2 * len(cases)),
        dpi=150,
        layout="constrained",
        squeeze=False,
    )
    device = DEVICES[rows[0]["planned_for"]]
    for (memory, speed), case in zip(axes, cases, strict=True):
        for way in WAYS:
            own = [row for row in rows if (row["case"], row["peer"]) == (case, way)]
            style: dict[str, Any] = {"marker": "o", "color": _COLOURS[way], "label": _LABELS[way]}
            ranks = [row["ranks"] for row in own]
            memory.plot(ranks, [row["rank_bytes"] / 1e9 for row in own], markersize=4, **style)
            fitting = [row for row in own if row["fits"]]
            each = [row["tokens_per_second"] / row["ranks"] for row in fitting]
            speed.plot([row["ranks"] for row in fitting], each, markersize=4, **style)
        memory.axhline(USABLE * device.memory_bytes / 1e9, color="#000000", linewidth=0.8)
        memory.set_ylim(0, 3 * device.memory_bytes / 1e9)
        memory.set_ylabel("GB of a rank")
        speed.set_ylabel("tokens per second and rank")
        speed.set_ylim(bottom=0)
        for panel in (memory, speed):
            panel.set_xscale("log", base=2)
            panel.set_title(case, fontsize=9)
            panel.set_xlabel("ranks")
            panel.grid(color="#DDDDDD", linewidth=0.6)
    axes[0][0].legend(fontsize=7, frameon=False)
    figure.savefig(path)
    pyplot.close(figure)
