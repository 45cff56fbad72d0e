"""Plans on fake tensors: what models save that do not fit here, and how good a search is.

Three kinds of rows. Of ``plan``: peak and saved bytes, and modelled seconds, of one model under
one configuration, beside torch's own partition of the graph without memopt's passes. Of
``tuning``: what the ways to tune a part of one model hold, in eager too. Of ``frontier``: for
every model of the zoo the peaks and recomputed operations that memopt, per-block checkpoints,
torch's min-cut and its ``activation_memory_budget`` can be set to.
"""

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

import memopt
from bench.plan_cases import PLANS, STOCK, Made, Options
from bench.zoo import MODELS, checkpoint_blocks
from bench.zoo.tuning import FORMS, tuned
from memopt._torch import FakeTensorMode, pytree
from memopt.backend import read_options
from memopt.cost import flops
from memopt.graph import OpKind
from memopt.outcome import Outcome
from memopt.planner.problem import Candidate
from memopt.planning import plan_with
from memopt.splitting import Splitter
from memopt.stock import stock_saved_set

CASE = "plans"
DEVICE = "h100"
Point = tuple[int, float]
# Several graphs to a step; and grouped products, which on fake tensors are of bfloat16 alone.
_NOT_PLANNED = {"graph_break", "functorch", "float32_only"}
_TUNED = {"vocab": 4096, "hidden": 256, "inter": 704, "batch": 4, "length": 512}


def run(device: str, say: Callable[[str], None]) -> list[dict[str, Any]]:
    """Rows of all kinds; the device that is planned for is in the table, not here."""
    rows = []
    for name, case in PLANS.items():
        for peer, options in {"inductor": STOCK, **case.options}.items():
            rows.append(_plan_row(name, case.make, peer, options))
            say(f"{name}: {peer}: {rows[-1]}")
    for form in FORMS:
        rows += _tuning_rows(form)
        say(f"{form}: " + ", ".join(f"{r['peer']} {r['held_bytes']}" for r in rows[-3:]))
    for name, model in MODELS.items():
        if "bench" in model.sizes and not model.tags & _NOT_PLANNED:
            own = _frontier_rows(name)
            say(f"{name}: " + ", ".join(f"{row['peer']} {row['area']:.3f}" for row in own))
            rows += own
    return rows


def _tuning_rows(form: str) -> list[dict[str, Any]]:
    """What one way to tune a part of a model holds between the halves, by peer."""

    def make() -> Made:
        return tuned(form, **_TUNED)

    peers: Mapping[str, Options] = {"inductor": STOCK, "memopt": {"memory_budget": None}}
    planned = [_plan_row(form, make, peer, options) for peer, options in peers.items()]
    with FakeTensorMode(allow_non_fake_inputs=True):
        eager = eager_held_bytes(*make())
    own = {"kind": "tuning", "case": form, "planned_for": DEVICE}
    return [
        own | {"peer": "eager", "held_bytes": eager},
        *(
            own | {"peer": r["peer"], "held_bytes": r["saved_bytes"] + r["output_bytes"]}
            for r in planned
        ),
    ]


def eager_held_bytes(model: nn.Module, inputs: Mapping[str, Tensor]) -> int:
    """What autograd and the caller hold of a forward, beside parameters, buffers and inputs."""
    resident = (*model.parameters(), *model.buffers(), *inputs.values())
    known = {tensor.untyped_storage()._cdata for tensor in resident}
    held: dict[int, Any] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in known:
            held[storage._cdata] = storage
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        output = model(**inputs)
    for tensor in pytree.tree_leaves(output):
        pack(tensor)
    return sum(storage.nbytes() for storage in held.values())


def _plan_row(name: str, make: Callable[[], Made], peer: str, options: Options) -> dict[str, Any]:
    """One model under one configuration; torch's partition where no pass of memopt's runs."""
    report = memopt.plan_for(make, device=DEVICE, options=options)
    graph = max(report.graphs, key=lambda g: g.baseline_peak_bytes)
    label = "stock partition" if peer == "inductor" else "plan"
    timeline = next(t for t in graph.timelines if t.label == label)
    return {
        "kind": "plan",
        "case": name,
        "peer": peer,
        "planned_for": DEVICE,
        "peak_bytes": timeline.peak_bytes,
        "saved_bytes": sum(r.nbytes for r in timeline.ranges if r.role == "saved"),
        "output_bytes": sum(r.nbytes for r in timeline.ranges if r.role == "output"),
        "host_bytes": graph.host_bytes,
        "step_seconds": graph.step_seconds,
        "kept_step_seconds": graph.baseline_step_seconds,
        "planning_seconds": graph.planning_seconds,
    }


@dataclass
class _Recorder(Splitter):
    """A splitter that notes torch's saved sets too, by its activation budget."""

    knob: dict[float, set[str]] = field(default_factory=dict)

    def _stock(self, gm: Any, info: Any) -> set[str] | None:
        for share in (1.0, 0.5, 0.3, 0.1, 0.0):
            self.knob[share] = stock_saved_set(gm, info, share)
        return self.knob[1.0]


def _frontier_rows(name: str) -> list[dict[str, Any]]:
    """The area under each peer's curve; none where a step has several graphs.

    Nor of per-block checkpoints where they break the graph.
    """
    split = _recorded(name, checkpoint=False)
    if split is None:
        return []
    outcome = split.outcomes[-1]
    search, problem = outcome.search, outcome.problem
    kept, floor = search.everything_kept.peak_bytes, search.floor.peak_bytes
    budgets = [floor + (kept - floor) * step // 12 for step in range(13)]
    ours = [plan for budget in budgets if (plan := search.plan(budget))]
    knob = [problem.evaluate(_indices(outcome, names), "knob") for names in split.knob.values()]
    curves = {"memopt": ours, "min-cut": knob[:1], "activation budget": knob}
    points = {peer: [_point(outcome, c) for c in plans] for peer, plans in curves.items()}
    if "checkpoint" in MODELS[name].tags and (other := _recorded(name, checkpoint=True)):
        last = other.outcomes[-1]
        saved = _indices(last, other.knob[1.0])
        points["checkpoint"] = [_point(last, last.problem.evaluate(saved, "checkpoint"))]
    low = min(peak for curve in points.values() for peak, _ in curve)
    most = sum(
        flops(node)
        for i, node in enumerate(problem.joint.nodes)
        if problem.joint.required_forward[i] and problem.joint.kind[i] is not OpKind.VIEW
    )
    return [
        {
            "kind": "frontier",
            "case": name,
            "peer": peer,
            "planned_for": DEVICE,
            "low_bytes": low,
            "kept_bytes": kept,
            "points": sorted(curve),
            "area": area(curve, low, kept, most),
        }
        for peer, curve in points.items()
    ]


def _recorded(name: str, *, checkpoint: bool) -> _Recorder | None:
    """The splitter of a step's graph; None where the step has several."""

    def make() -> Made:
        recipe = MODELS[name].sizes["bench"]
        model, inputs = recipe.build(), recipe.inputs(0)
        if checkpoint:
            checkpoint_blocks(model)
        return model, inputs

    splits = plan_with(make, read_options({"device": DEVICE}), _Recorder)
    trained = [each for each in splits if isinstance(each, _Recorder) and each.outcomes]
    return trained[0] if len(trained) == 1 else None


def _indices(outcome: Outcome, names: set[str]) -> list[int]:
    return [i for i, node in enumerate(outcome.problem.joint.nodes) if node.name in names]


def _point(outcome: Outcome, plan: Candidate) -> Point:
    """Its peak bytes, and the operations that it runs a second time."""
    joint = outcome.problem.joint
    again = (i for i in plan.liveness.schedule.recomputed if joint.kind[i] is not OpKind.VIEW)
    return plan.peak_bytes, sum(flops(joint.nodes[i]) for i in again)


def area(curve: Sequence[Point], low: int, high: int, most: float) -> float:
    """Mean share of the forward's operations that is run again, over all peaks from low to high.

    Args:
        curve: peaks in bytes, and operations.
        low: the least peak.
        high: the largest.
        most: operations of the forward, which count where no point has as low a peak.
    """
    edges = sorted({low, high, *(peak for peak, _ in curve if low < peak < high)})
    total = 0.0
    for left, right in itertools.pairwise(edges):
        fits = [again for peak, again in curve if peak <= left]
        total += (right - left) * min([most, *fits])
    return total / (max(high - low, 1) * most)
