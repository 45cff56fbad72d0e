"""Joint graph in, forward and backward out: passes, planning and partition, for any lowering."""

import gc
import time
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import fx

from memopt._torch import (
    NodeInfo,
    classify_nodes,
    pytree,
    trace_structured,
)
from memopt.chunking import (
    chunk_rows,
    double_chunks,
    halve_chunks,
    highest_in_chunks,
    set_chunk_rows,
)
from memopt.config import Config
from memopt.cost import CostModel
from memopt.cutting import Cutting, Draft, Traced
from memopt.device import DEVICES, DeviceSpec, device_spec, spec_for_product
from memopt.forms import Form, offer
from memopt.graph import INLINED, tensors
from memopt.joint import JointGraph, index_joint_graph
from memopt.outcome import Outcome, load_plan, read_plan
from memopt.partition import partition
from memopt.passes import CUT_MAPS, CUT_ROWS, FORMS, JOINT, POST_GRAD
from memopt.passes.compress import Compress
from memopt.passes.map_moves import write_in_place
from memopt.passes.offload import Offload, OffloadToFiles
from memopt.pipeline import PassContext, Pipeline, configure
from memopt.planner.problem import Candidate, Problem
from memopt.planner.search import Search
from memopt.stock import stock_saved_set, tidied

# Share of the budget that a first attempt leaves free: where loops merge in a way that the model
# does not see, the emitted code was at most this much above it on most graphs, and trying again
# costs as much as compiling.
_FIRST_MARGIN = 0.02

Halves = tuple[fx.GraphModule, fx.GraphModule]


@contextmanager
def collector_paused() -> Iterator[None]:
    """Without Python's collector of cycles: a third of planning is its looking at graphs."""
    if not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


@dataclass
class Splitter:
    """Plans and partitions joint graphs under one configuration.

    Attributes:
        config: the user's options.
        ctx: where passes speak.
        held_bytes: what earlier graphs of the same step hold while this one runs.
        margin_bytes: how far below the budget to aim, since the last attempt overshot; None on
            the first attempt, which leaves what the model of a fusing lowering usually misses.
        outcomes: one per joint graph split so far.
        forward: what planning a graph without a backward came to, where it was asked for.
    """

    config: Config
    ctx: PassContext
    held_bytes: int = 0
    margin_bytes: int | None = None
    outcomes: list[Outcome] = field(default_factory=list, init=False)
    forward: Outcome | None = field(default=None, init=False)

    @collector_paused()
    def __call__(
        self,
        gm: fx.GraphModule,
        inputs: Sequence[Any],
        *,
        num_fwd_outputs: int,
        static_lifetime_input_indices: Sequence[int] | None = None,
        **_: Any,
    ) -> Halves:
        """Split one joint graph; the signature is torch's for a ``partition_fn``."""
        gm = tidied(gm)
        Pipeline("joint", JOINT).run(gm, self.ctx)
        static = [*(static_lifetime_input_indices or ())]
        draft = self._draft(Traced(gm, static, num_fwd_outputs, CUT_ROWS))
        gm, info, outcome = draft.traced.gm, draft.info, draft.outcome
        joint = outcome.problem.joint
        self.outcomes.append(outcome)
        trace_structured(
            "artifact",
            metadata_fn=lambda: {"name": "memopt_plan", "encoding": "json"},
            payload_fn=lambda: outcome.plan.to_json(),
        )
        liveness = outcome.chosen.liveness
        halves = partition(gm, info, liveness.schedule, num_fwd_outputs=num_fwd_outputs)
        for half, inlined in zip(halves, liveness.inlined, strict=True):
            names = {joint.nodes[i].name for i in inlined}
            for node in half.graph.nodes:
                if node.name in names:
                    node.meta[INLINED] = True
            Pipeline("post_grad", POST_GRAD).run(half, self.ctx)
        return halves

    @property
    def cuts_forwards(self) -> bool:
        """Whether the budget bounds graphs without a backward: a share is one of training's."""
        return self.config.memory_budget.kind in ("bytes", "min") and self.config.plan is None

    @collector_paused()
    def cut_forward(self, graph: fx.Graph) -> None:
        """Cut what is widest in a graph without a backward, where it does not fit otherwise.

        Args:
            graph: changed in place.
        """
        gm: Any = graph.owning_module
        (output,) = graph.find_nodes(op="output")
        rows = Traced(gm, [], len(pytree.tree_leaves(output.args)), CUT_ROWS)
        uncut = self._planned(rows.cut({}), self.ctx)
        cutting = Cutting(self._planned, self.ctx)
        drafts = [cutting.search(rows, uncut)]
        if cutting.is_asked_for(drafts[0]):
            drafts.append(cutting.search(replace(rows, cutter=CUT_MAPS), uncut))
        best = min(drafts, key=lambda d: (not d.outcome.fits, d.liveness.peak_bytes))
        cutting.say(best)
        self.forward = best.outcome
        best.traced.cutter(graph, best.outcome.cut)
        write_in_place(graph)

    def _draft(self, joint: Traced) -> Draft:
        """Plan; where nothing fits, and for the lowest peak, cut what is widest into pieces."""
        if self.config.plan is not None:
            return self._planned(joint.cut(read_plan(self.config.plan).cut), self.ctx)
        cutting = Cutting(self._planned, self.ctx)
        best = cutting.search(joint, self._planned(joint.cut({}), self.ctx))
        cutting.say(best)
        return best

    def _planned(self, joint: Traced, ctx: PassContext, uncut: Outcome | None = None) -> Draft:
        """One graph's plan.

        Args:
            joint: the graph; changed.
            ctx: where forms speak.
            uncut: of the same graph before it was cut, which the budget may be a fraction of.
        """
        gm = joint.gm
        info = classify_nodes(gm, joint.static, joint.num_fwd_outputs)
        stock = self._stock(gm, info)
        offer(gm.graph, self._forms(), ctx, device_of(gm.graph.nodes, self.config))
        indexed = index_joint_graph(gm, info, num_fwd_outputs=joint.num_fwd_outputs)
        outcome = self._plan(indexed, stock, uncut)
        return Draft(joint, info, replace(outcome, cut=joint.pieces))

    def _stock(self, gm: fx.GraphModule, info: NodeInfo) -> set[str] | None:
        """What torch's own partition saves, to start from; eager's lowering has none."""
        return stock_saved_set(gm, info) if self.config.lowering == "inductor" else None

    def _forms(self) -> list[Form]:
        """Those that values may be held in; without a budget, none but their own."""
        if self.config.memory_budget.kind == "none":
            return []
        named = [f for f in FORMS if self.config.enabled(f.name, default=f.default)]
        return [configure(form, self.config) for form in named]

    def _plan(
        self, joint: JointGraph, stock: Collection[str] | None, uncut: Outcome | None
    ) -> Outcome:
        """Plan; where the peak is too high in a chunked operator, halve its chunks and again.

        Chunks are doubled where that costs no byte: within the budget or, with none, below the
        peak of the rest of the step.
        """
        start = time.perf_counter()
        outcome = best = self._search(joint, stock, uncut)
        rows = chunk_rows(joint)
        while not best.fits or self.config.memory_budget.kind == "min":
            if self.config.plan is not None or not halve_chunks(joint, outcome.chosen):
                break
            outcome = self._search(joint, stock, uncut)
            if outcome.chosen.peak_bytes < best.chosen.peak_bytes:
                best, rows = outcome, chunk_rows(joint)
        set_chunk_rows(joint, rows)
        if best.fits and self.config.plan is None:
            best = self._with_larger_chunks(joint, best)
        return replace(best, seconds=time.perf_counter() - start)

    def _with_larger_chunks(self, joint: JointGraph, outcome: Outcome) -> Outcome:
        """The same plan with as few chunks as its budget allows.

        With none they stay as far below its peak as they would below a budget.
        """
        peak, own = outcome.chosen.peak_bytes, outcome.chosen.liveness.peak_bytes
        aim, below = self._aim(outcome.limit_bytes) or peak, self._aim(own) or own
        grown = [outcome]

        def fits() -> bool:
            problem = replace(outcome.problem)  # what it remembers was of smaller chunks
            chosen = problem.evaluate(outcome.chosen.saved, outcome.chosen.origin)
            free = outcome.limit_bytes is not None or highest_in_chunks(joint, chosen) <= below
            if chosen.peak_bytes > aim or not free:
                return False
            grown.append(replace(outcome, problem=problem, chosen=chosen))
            return True

        double_chunks(joint, fits, on_cpu=outcome.problem.cost.device.name == "cpu")
        return grown[-1]

    def _aim(self, limit_bytes: int | None) -> int | None:
        """The peak to plan for, below the budget by what the model may miss."""
        if limit_bytes is None:
            return None
        if self.margin_bytes is not None:
            return limit_bytes - self.margin_bytes
        fused = self.config.lowering == "inductor"
        return limit_bytes - (int(limit_bytes * _FIRST_MARGIN) if fused else 0)

    def _search(
        self, joint: JointGraph, stock: Collection[str] | None, uncut: Outcome | None
    ) -> Outcome:
        fused = self.config.lowering == "inductor"
        plan = None if self.config.plan is None else load_plan(joint, self.config.plan)
        if plan is not None:
            set_chunk_rows(joint, plan.chunk_rows)
        cost = CostModel(
            device_of(joint.nodes, self.config), fused, self.config.cost == "measured"
        )
        forms = self._forms()
        away = [form for form in forms if isinstance(form, Offload | OffloadToFiles)]
        links = {form.kind: form.link(cost.device) for form in away}
        error = max((form.error for form in forms if isinstance(form, Compress)), default=0.0)
        problem = Problem(joint, cost, links, error, self.config.repeats)
        search = Search(
            problem,
            fastest=None
            if stock is None
            else [i for i, n in enumerate(joint.nodes) if n.name in stock],
            solver=self.config.solver,
            time_limit=self.config.solver_seconds,
        )
        kept = (uncut.search if uncut else search).everything_kept.peak_bytes
        limit = self.config.memory_budget.limit_bytes(kept)
        if limit is not None:
            limit -= self.held_bytes
        if plan is not None:
            saved = [i for i, node in enumerate(joint.nodes) if node.name in plan.saved]
            chosen: Candidate | None = problem.evaluate(saved, f"replayed from {self.config.plan}")
        elif self.config.memory_budget.kind == "min":
            floor = search.floor
            chosen = search.plan(floor.peak_bytes) or floor
        else:
            chosen = search.plan(self._aim(limit))
            if chosen is None and self.margin_bytes is None:
                chosen = search.plan(limit)
        return Outcome(problem, search, chosen or search.floor, limit, chosen is not None)


def device_of(nodes: Iterable[fx.Node], config: Config) -> DeviceSpec:
    """The device to plan for: the one named in the options, else the one the tensors are on."""
    if config.device is not None:
        return device_spec(config.device)
    for node in nodes:
        for tensor in tensors(node.meta.get("val")):
            if tensor.device.type == "cuda":
                return spec_for_product(torch.cuda.get_device_name(tensor.device))
            if tensor.device.type != "cpu":
                return DEVICES["a100"]
    return DEVICES["cpu"]
