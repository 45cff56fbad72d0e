"""What is known about one compiled graph once it is compiled: the raw material of a report."""

from dataclasses import dataclass

from memopt.memory.timeline import Timeline
from memopt.plan import Plan
from memopt.remarks import Remark


@dataclass(frozen=True, slots=True, kw_only=True)
class DecisionRow:
    """The fate of one storage that the backward needs.

    Attributes:
        name: the joint-graph node that owns the storage.
        op: the operator that makes it, such as ``"aten.mm.default"``.
        kind: ``"keep"``, ``"recompute"``, or what was done to it to hold it, such as ``"pack"``.
        nbytes: bytes of the storage.
        seconds: modelled cost of making it once more, in seconds.
        source: the user's ``file:line``, or ``""``.
    """

    name: str
    op: str
    kind: str
    nbytes: int
    seconds: float
    source: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class GraphRecord:
    """One compiled graph: what it costs, what was decided, what was said.

    Attributes:
        id: a short name, unique within a report: ``"graph 0"``.
        training: whether there is a backward half.
        lowering: ``"inductor"`` or ``"eager"``.
        baseline_peak_bytes: modelled peak with every value the backward needs kept.
        predicted_peak_bytes: peak of the final schedule, certified where ``certified`` is true.
        certified: whether the peak was read from the code that will run.
        budget: what was asked for, as it was written: ``"none"``, ``"min"``, ``"0.5"``, a size.
        budget_bytes: the bound this graph was planned under, or None.
        held_bytes: bytes that earlier graphs of the same step hold while this one runs.
        saved_bytes: bytes that cross from forward to backward, parameters and inputs excluded.
        recompute_seconds: modelled time the plan spends on recomputation, per step.
        forward_seconds: modelled time of the forward half, per step.
        planning_seconds: wall-clock time of planning.
        solver: which search found the plan.
        plan: what was decided, to keep as ``plan.to_json()`` and replay; None in inference.
        decisions: one row per storage that the backward needs.
        rewrites: number of rewrites by pass name.
        remarks: everything the passes and the planner said.
        timelines: ``"everything kept"``, ``"stock partition"`` and ``"plan"``, forward and
            backward in schedule order; inference graphs have only ``"plan"``.
        step_seconds: modelled time of both halves.
        baseline_step_seconds: the same with every value kept.
        host_bytes: bytes of values that are held in the host's memory.
        file_bytes: bytes of values that are held in files.
        stall_seconds: modelled time that the step waits for their copies.
    """

    id: str
    training: bool
    lowering: str
    baseline_peak_bytes: int
    predicted_peak_bytes: int
    certified: bool
    budget: str
    budget_bytes: int | None
    held_bytes: int
    saved_bytes: int
    recompute_seconds: float
    forward_seconds: float
    planning_seconds: float
    solver: str
    plan: Plan | None
    decisions: tuple[DecisionRow, ...]
    rewrites: dict[str, int]
    remarks: tuple[Remark, ...]
    timelines: tuple[Timeline, ...]
    step_seconds: float = 0.0
    baseline_step_seconds: float = 0.0
    host_bytes: int = 0
    file_bytes: int = 0
    stall_seconds: float = 0.0
