"""Synthetic graph records that look like those of a small transformer."""

import dataclasses
from collections.abc import Iterable
from typing import Any

from memopt.memory.timeline import LiveRange, Step, Timeline
from memopt.record import DecisionRow, GraphRecord
from memopt.remarks import Remark, RemarkKind

MIB = 2**20
# (name, operator, MiB of the output, line, seconds to make it again)
_BLOCK = (
    ("norm1", "aten.rms_norm.default", 2.0, 41, 4e-5),
    ("qkv", "aten.mm.default", 6.0, 47, 9e-4),
    ("attention", "aten._scaled_dot_product_flash_attention.default", 2.1, 52, 1.4e-3),
    ("project", "aten.mm.default", 2.0, 55, 3e-4),
    ("residual1", "aten.add.Tensor", 2.0, 56, 3e-5),
    ("norm2", "aten.rms_norm.default", 2.0, 58, 4e-5),
    ("gate", "aten.mm.default", 5.5, 61, 8e-4),
    ("up", "aten.mm.default", 5.5, 62, 8e-4),
    ("act", "aten.mul.Tensor", 5.5, 63, 6e-5),
    ("down", "aten.mm.default", 2.0, 64, 8e-4),
    ("residual2", "aten.add.Tensor", 2.0, 65, 3e-5),
)
_CHEAP = frozenset({"norm1", "residual1", "norm2", "act", "residual2"})
_PLANNED = _CHEAP | {"gate", "up", "project", "down"}


def source_of(line: int) -> str:
    return f"/home/user/project/models/llama.py:{line}"


def make_training_timeline(
    label: str = "plan", *, layers: int = 8, recomputed: Iterable[str] = _PLANNED
) -> Timeline:
    """A forward, then a backward that makes ``recomputed`` once more where it needs them."""
    again = frozenset(recomputed)
    steps: list[Step] = []
    ranges: list[LiveRange] = []
    born: dict[tuple[int, str], int] = {}
    for layer in range(layers):
        for name, _, size, line, _ in _BLOCK:
            born[layer, name] = len(steps)
            steps.append(Step(f"{name}_{layer}", source_of(line)))
            if name in again:
                ranges.append(_range(f"{name}_{layer}", size, len(steps) - 1, 2, line))
    gradients: list[tuple[int, str, int]] = []
    for layer in reversed(range(layers)):
        for name, _, size, line, _ in reversed(_BLOCK):
            value = f"{name}_{layer}"
            if name in again:
                steps.append(Step(f"{value}_recomputed", source_of(line), backward=True))
                again_at = len(steps) - 1
                ranges.append(_range(f"{value}_recomputed", size, again_at, 2, line, "recomputed"))
            now = len(steps)
            steps.append(Step(f"{value}_backward", source_of(line), backward=True))
            if name not in again:
                at = born[layer, name]
                ranges.append(_range(value, size, at, now - at + 1, line, "saved"))
            ranges.append(_range(f"{value}_grad", size, now, 2, line))
            if name in {"qkv", "project", "gate", "up", "down"}:
                gradients.append((now, f"weight_{value}_grad", line))
    for at, name, line in gradients:
        ranges.append(_range(name, 0.7, at, len(steps) - at, line, "gradient"))
    last = len(steps) - 1
    clipped = tuple(dataclasses.replace(r, last=min(r.last, last)) for r in ranges)
    return Timeline(label, tuple(steps), clipped)


def make_inference_timeline(label: str = "plan", *, layers: int = 8) -> Timeline:
    steps: list[Step] = []
    ranges: list[LiveRange] = []
    for layer in range(layers):
        for name, _, size, line, _ in _BLOCK:
            ranges.append(_range(f"{name}_{layer}", size, len(steps), 2, line))
            steps.append(Step(f"{name}_{layer}", source_of(line)))
    clipped = tuple(dataclasses.replace(r, last=min(r.last, len(steps) - 1)) for r in ranges)
    return Timeline(label, tuple(steps), clipped)


def make_decisions(layers: int = 8) -> tuple[DecisionRow, ...]:
    return tuple(
        DecisionRow(
            name=f"{name}_{layer}",
            op=op,
            kind="recompute" if name in _PLANNED else "keep",
            nbytes=int(size * MIB),
            seconds=float("inf") if name == "attention" else seconds,
            source=source_of(line),
        )
        for layer in range(layers)
        for name, op, size, line, seconds in _BLOCK
    )


def make_remarks(layers: int = 8) -> tuple[Remark, ...]:
    fused = [
        Remark(
            pass_name="fuse_swiglu",
            kind=RemarkKind.APPLIED,
            text="gate and up are one product, whose halves the activation reads in place",
            node=f"act_{layer}",
            source=source_of(63),
        )
        for layer in range(layers)
    ]
    missed = Remark(
        pass_name="chunk_losses",
        kind=RemarkKind.MISSED,
        text="the logits are an output of the graph, so they exist whole in any case",
        node="logits",
        source="/home/user/project/train.py:88",
    )
    bound = Remark(
        pass_name="planner",
        kind=RemarkKind.ANALYSIS,
        text="the backward of layer 7 binds: 31 storages are alive there",
    )
    return (*fused, missed, bound)


def make_record(layers: int = 8, **changes: Any) -> GraphRecord:
    """A training graph with three timelines; ``changes`` replaces any of its fields."""
    timelines = (
        make_training_timeline("everything kept", layers=layers, recomputed=()),
        make_training_timeline("stock partition", layers=layers, recomputed=_CHEAP),
        make_training_timeline("plan", layers=layers),
    )
    record = GraphRecord(
        id="graph 0",
        training=True,
        lowering="inductor",
        baseline_peak_bytes=timelines[0].peak_bytes,
        predicted_peak_bytes=timelines[2].peak_bytes,
        certified=True,
        budget="0.5",
        budget_bytes=int(timelines[2].peak_bytes * 1.03),
        held_bytes=0,
        saved_bytes=int(layers * 8.1 * MIB),
        recompute_seconds=0.0232,
        forward_seconds=0.078,
        planning_seconds=0.412,
        solver="hull, then milp",
        plan=None,
        decisions=make_decisions(layers),
        rewrites={"fuse_swiglu": layers, "chunk_losses": 0},
        remarks=make_remarks(layers),
        timelines=timelines,
    )
    return dataclasses.replace(record, **changes)


def make_inference_record(layers: int = 8, **changes: Any) -> GraphRecord:
    """An inference graph: one timeline, nothing saved, nothing decided."""
    timeline = make_inference_timeline(layers=layers)
    fields: dict[str, Any] = {
        "training": False,
        "timelines": (timeline,),
        "baseline_peak_bytes": timeline.peak_bytes,
        "predicted_peak_bytes": timeline.peak_bytes,
        "budget": "none",
        "budget_bytes": None,
        "saved_bytes": 0,
        "recompute_seconds": 0.0,
        "decisions": (),
        "rewrites": {},
        "remarks": (),
    }
    return make_record(layers, **{**fields, **changes})


def _range(
    name: str, mib: float, first: int, steps: int, line: int, role: str = "temporary"
) -> LiveRange:
    return LiveRange(
        name=name,
        nbytes=int(mib * MIB),
        first=first,
        last=first + steps - 1,
        source=source_of(line),
        role=role,
    )
