"""What planning one joint graph came to, and the plan files that belong to a graph."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from memopt.chunking import chunk_rows
from memopt.errors import PlanError
from memopt.graph import source_line, tensors
from memopt.joint import JointGraph
from memopt.plan import Plan, fingerprint
from memopt.planner.problem import Candidate, Problem
from memopt.planner.search import Search
from memopt.record import DecisionRow
from memopt.stored import read_plan_text


@dataclass(frozen=True)
class Outcome:
    """What planning one joint graph came to.

    Attributes:
        problem: the priced graph.
        search: the planning session, with the baselines in it.
        chosen: the plan that the partition follows.
        limit_bytes: the bound that it was asked to meet, or None.
        fits: whether the model says that it meets it.
        seconds: wall-clock time of planning.
        cut: as in `Plan`.
    """

    problem: Problem
    search: Search
    chosen: Candidate
    limit_bytes: int | None
    fits: bool
    seconds: float = 0.0
    cut: Mapping[str, int] = field(default_factory=dict)

    @property
    def plan(self) -> Plan:
        """The decision as data."""
        joint = self.problem.joint
        return Plan(
            fingerprint=graph_fingerprint(joint),
            saved=tuple(sorted(joint.nodes[i].name for i in self.chosen.saved)),
            peak_bytes=self.chosen.peak_bytes,
            seconds=self.chosen.seconds,
            budget_bytes=self.limit_bytes,
            solver=self.chosen.origin,
            chunk_rows=chunk_rows(joint),
            cut=self.cut,
        )

    def decisions(self) -> tuple[DecisionRow, ...]:
        """The fate of every storage that the backward needs, largest first."""
        joint, problem = self.problem.joint, self.problem
        kept = problem.saved_storages(self.chosen.saved)
        used = [e for e in joint.encodings if e.encoded in self.chosen.saved]
        encoded = {joint.storage_of[e.source][0]: e for e in used}
        kept -= {joint.storage_of[e.encoded][0] for e in used}
        asked = kept | encoded.keys() | problem.saved_storages(self.search.everything_kept.saved)
        rows = []
        for s in asked:
            storage = joint.storages[s]
            node = joint.nodes[storage.owner]
            kind = encoded[s].kind if s in encoded else "keep" if s in kept else "recompute"
            rows.append(
                DecisionRow(
                    name=joint.nodes[storage.base].name,
                    op=str(node.target),
                    kind=kind,
                    nbytes=storage.nbytes,
                    seconds=problem.seconds[storage.owner],
                    source=source_line(node),
                )
            )
        return tuple(sorted(rows, key=lambda row: (-row.nbytes, row.name)))


def read_plan(path: str) -> Plan:
    """A plan file.

    Raises:
        PlanError: the file cannot be read, or is no plan.
    """
    return Plan.from_json(read_plan_text(path))


def load_plan(joint: JointGraph, path: str) -> Plan:
    """A plan file that belongs to this graph.

    Raises:
        PlanError: the file cannot be read, or was made for another graph.
    """
    plan = read_plan(path)
    own = graph_fingerprint(joint)
    if plan.fingerprint != own:
        raise PlanError(
            f"the plan {path!r} was made for graph {plan.fingerprint}, this graph is {own}: "
            f"the model, its input shapes or torch changed; plan again"
        )
    known = {node.name for node in joint.nodes}
    if strangers := [name for name in (*plan.saved, *plan.chunk_rows) if name not in known]:
        raise PlanError(
            f"the plan {path!r} saves {strangers[:5]}, which the graph does not have: it was "
            f"edited; plan again"
        )
    return plan


def graph_fingerprint(joint: JointGraph) -> str:
    """Identity of a joint graph: operators, shapes, dtypes and edges, in order."""
    lines = []
    for node, inputs in zip(joint.nodes, joint.inputs, strict=True):
        shapes = [(tuple(map(str, t.shape)), str(t.dtype)) for t in tensors(node.meta.get("val"))]
        lines.append(f"{node.name} {node.target} {inputs} {shapes}")
    return fingerprint(lines)
