"""Did it fit, and if not, why: the words that the user reads."""

import math
from collections.abc import Sequence
from typing import Any

import torch.distributed as dist

from memopt.budget import Budget
from memopt.errors import BudgetInfeasibleError
from memopt.graph import source_line
from memopt.memory.timeline import LiveRange, Timeline
from memopt.outcome import Outcome
from memopt.proofs import Proof
from memopt.record import GraphRecord
from memopt.remarks import RemarkKind
from memopt.splitting import Splitter
from memopt.units import format_bytes

_HOLDERS_SHOWN = 5


def require_fit(split: Splitter, proof: Proof, most_held_bytes: int = 0) -> None:
    """Check the proof where there is one, the model's word where there is none.

    Args:
        split: what was planned.
        proof: what was emitted.
        most_held_bytes: what earlier graphs of the step would hold under a larger budget.

    Raises:
        BudgetInfeasibleError: the step does not fit, whatever is recomputed.
    """
    limit = proof.limit_bytes
    if limit is None:
        return
    if proof.emitted is not None:
        peak, timeline = proof.emitted_peak_bytes or 0, proof.emitted.timeline
    elif (planned := _planned(split)) is not None and not planned.fits:
        floor = planned.chosen
        peak, timeline = floor.peak_bytes, floor.liveness.timeline("floor")
    else:
        return
    if peak > limit:
        if split.outcomes:
            timeline = split.outcomes[-1].chosen.liveness.timeline("floor")
        advised = _advised(split.config.memory_budget, limit, peak, most_held_bytes)
        budget, lowest = limit + split.held_bytes, peak + split.held_bytes
        raise BudgetInfeasibleError(
            infeasible_text(split, budget, lowest, timeline, most_held_bytes, advised),
            budget_bytes=budget,
            floor_bytes=lowest,
            advised=advised,
        )


def _planned(split: Splitter) -> Outcome | None:
    """What planning came to: of the last step, or of a graph without a backward."""
    return split.outcomes[-1] if split.outcomes else split.forward


def _advised(budget: Budget, limit: int, peak: int, most_held_bytes: int) -> int | float | str:
    """A little more than the graph's own peak needs, as the budget was written.

    Earlier graphs hold more under a larger budget. A fraction stays one: bytes would bound the
    step and not each graph.
    """
    if budget.kind == "bytes":
        return (peak + most_held_bytes) * 101 // 100
    share = peak * budget.value
    if share >= limit + 1:  # emitted code can be higher than everything kept in the graph
        return "min"
    return min(math.floor(100 * share / max(limit, 1)) + 1, 100) / 100


def infeasible_text(
    split: Splitter,
    limit: int,
    floor: int,
    timeline: Timeline,
    most_held_bytes: int,
    advised: int | float | str,
) -> str:
    """The floor, the step that binds, who is alive there, and the cheapest way out."""
    step = timeline.steps[timeline.peak_step]
    holders = timeline.holders(timeline.peak_step)
    shown = "".join(f"\n  {_holder(h)}" for h in holders[:_HOLDERS_SHOWN])
    more = len(holders) - _HOLDERS_SHOWN
    rest = f"\n  and {more} smaller ones" if more > 0 else ""
    held = ""
    if split.held_bytes:
        more_held = f", up to {format_bytes(most_held_bytes)} under a larger one"
        held = (
            f" ({format_bytes(split.held_bytes)} of it is held by earlier graphs of the step"
            f"{more_held * (most_held_bytes > split.held_bytes)})"
        )
    if split.config.repeats > 1:
        held += f" for {split.config.repeats} repeats of the graph"
    budget, lowest = format_bytes(limit), format_bytes(floor)
    if budget == lowest:
        budget, lowest = f"{limit:,} B", f"{floor:,} B"
    return (
        f"no plan fits memory_budget = {budget}{held}{_on_a_rank()}: the lowest peak found is "
        f"{lowest}.\n"
        f"It binds at {step.name}{_at(step.source)}, in the "
        f"{'backward' if step.backward else 'forward'}, where these are alive:{shown}{rest}\n"
        f"Cheapest next action: {_next_action(holders, advised, bool(split.outcomes))}"
    )


def _on_a_rank() -> str:
    """Which rank this is, where there are more."""
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return ""
    return (
        f" on rank {dist.get_rank()} of {dist.get_world_size()} (the others may wait for it: let "
        f"this error end its process)"
    )


def _next_action(ordered: Sequence[LiveRange], advised: int | float | str, training: bool) -> str:
    to = format_bytes(advised) if isinstance(advised, int) else repr(advised)
    raise_it = f"{'set' if advised == 'min' else 'raise'} memory_budget to {to}"
    if not ordered:
        return raise_it
    largest = ordered[0]
    if largest.role == "tangent":  # the gradient of an output has the output's size
        twins = [h for h in ordered if h.role == "output" and h.nbytes == largest.nbytes]
        largest = twins[0] if twins else largest
    advice = {
        "output": f"do not return {largest.name}, or drop it before the backward",
        "gradient": "freeze parameters, or accumulate their gradients in a smaller dtype",
    }.get(largest.role, "split the batch in two" + " and accumulate gradients" * training)
    return f"{raise_it}, or {advice}."


def _holder(r: LiveRange) -> str:
    return f"{format_bytes(r.nbytes):>10}  {r.name} ({r.role}){_at(r.source)}"


def _at(source: str) -> str:
    return f" at {source}" if source else ""


def one_line(split: Splitter, proof: Proof) -> str:
    """The log line of one graph: bytes before and after."""
    emitted = proof.emitted
    emitted_peak = proof.emitted_peak_bytes
    peak = proof.planned_peak_bytes or 0 if emitted_peak is None else emitted_peak
    now = f"{format_bytes(peak)} ({'certified' if emitted else 'estimated'})"
    if not split.outcomes:
        return f"peak {now}, from the compile cache"
    outcome = split.outcomes[-1]
    return (
        f"peak {format_bytes(outcome.search.everything_kept.peak_bytes)} -> {now}, "
        f"saved {format_bytes(outcome.chosen.liveness.saved_bytes)}, recompute "
        f"{1e3 * outcome.chosen.recompute_seconds:.1f} ms of "
        f"{1e3 * outcome.problem.forward_seconds:.1f} ms forward, "
        f"planned in {outcome.seconds:.2f} s by {outcome.chosen.origin}"
    )


def make_record(split: Splitter, proof: Proof) -> GraphRecord:
    """Everything that a report says about one graph."""
    ctx, emitted = split.ctx, proof.emitted
    if isinstance(proof.certificate, str):
        ctx.remark("backend", RemarkKind.MISSED, f"not certified: {proof.certificate}")
    shared: dict[str, Any] = {
        "id": "graph",
        "lowering": split.config.lowering,
        "budget": str(split.config.memory_budget),
        "certified": emitted is not None or split.config.lowering == "eager",
        "held_bytes": split.held_bytes,
        "rewrites": dict(ctx.rewrites),
        "remarks": tuple(ctx.remarks),
    }
    if not split.outcomes:
        modelled = split.forward.chosen.peak_bytes if split.forward else 0
        peak = emitted.peak_bytes if emitted else modelled
        return GraphRecord(
            **shared,
            training=False,
            baseline_peak_bytes=peak,
            predicted_peak_bytes=peak,
            budget_bytes=proof.limit_bytes,
            saved_bytes=0,
            recompute_seconds=0.0,
            forward_seconds=0.0,
            planning_seconds=0.0,
            solver="none",
            plan=None,
            decisions=(),
            timelines=(emitted.timeline,) if emitted else (),
        )
    outcome = split.outcomes[-1]
    search, chosen = outcome.search, outcome.chosen
    emitted_peak = proof.emitted_peak_bytes
    _say_what_is_random(split, outcome)
    if proof.others:
        each = f"{proof.others} more graphs like it hold {format_bytes(proof.held_bytes)} each"
        ctx.remark("planner", RemarkKind.ANALYSIS, f"peaks are of a step in which {each}")
    shared["remarks"] = tuple(ctx.remarks)
    away = outcome.problem.away_bytes(chosen.saved)
    return GraphRecord(
        **shared,
        training=True,
        baseline_peak_bytes=search.everything_kept.peak_bytes,
        predicted_peak_bytes=chosen.peak_bytes if emitted_peak is None else emitted_peak,
        budget_bytes=outcome.limit_bytes,
        saved_bytes=chosen.liveness.saved_bytes,
        recompute_seconds=chosen.recompute_seconds,
        forward_seconds=outcome.problem.forward_seconds,
        planning_seconds=outcome.seconds,
        solver=chosen.origin,
        plan=outcome.plan,
        decisions=outcome.decisions(),
        timelines=(
            search.everything_kept.liveness.timeline("everything kept"),
            search.fastest.liveness.timeline("stock partition"),
            chosen.liveness.timeline("plan"),
        ),
        step_seconds=outcome.problem.step_seconds(chosen),
        baseline_step_seconds=outcome.problem.step_seconds(search.everything_kept),
        host_bytes=away.get("offload", 0),
        file_bytes=away.get("file", 0),
        stall_seconds=chosen.stall_seconds,
    )


def _say_what_is_random(split: Splitter, outcome: Outcome) -> None:
    """One remark per saved value that may not be made a second time."""
    problem = outcome.problem
    joint = problem.joint
    source = {e.encoded: e.source for e in joint.encodings}
    for i in sorted(source.get(i, i) for i in outcome.chosen.saved):
        owners = {joint.storages[s].owner for s in joint.storage_of[i]}
        if any(not joint.recomputable[o] and joint.nodes[o].op == "call_function" for o in owners):
            node = joint.nodes[i]
            text = "kept: running its operator again could give another value"
            split.ctx.remark("planner", RemarkKind.ANALYSIS, text, node.name, source_line(node))
