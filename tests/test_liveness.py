"""Liveness recomputed by other means: reference counts, and the allocator's own word."""

from collections.abc import Iterator, Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bench.meter import Meter
from memopt.graph import OpKind
from memopt.joint import JointGraph
from memopt.memory.liveness import Liveness, analyse
from memopt.memory.lives import storages_of
from memopt.memory.schedule import Schedule, make_schedule
from memopt.planner.problem import Problem
from tests.graphs import (
    OPERATORS,
    RANDOM,
    Captured,
    Program,
    lowered,
    problem_of,
    programs,
    savable,
)

# Beside a tensor a number becomes one, and one more of its dtype, while the operator runs.
UNSEEN_BYTES = 2 * 8
SCRATCHLESS = (*OPERATORS, "noise")
BUDGETS = (None, 0.9, 0.7, "min")


def simulate(schedule: Schedule) -> Iterator[int]:
    """Bytes at each step: an environment per half, every value dropped after its last reader.

    Autograd holds the gradient of the loss until the step ends.
    """
    joint = schedule.joint
    returned = [*joint.forward_outputs, *schedule.saved]
    yield from run(joint, schedule.forward, [], returned, held=[])
    arguments = [*schedule.saved, *joint.tangents]
    yield from run(
        schedule.behind,
        schedule.backward,
        arguments,
        joint.backward_outputs,
        held=[*joint.forward_outputs, *joint.tangents],
    )


def run(
    joint: JointGraph,
    order: Sequence[int],
    arguments: Sequence[int],
    returned: Sequence[int],
    held: Sequence[int],
) -> Iterator[int]:
    environment = set(arguments)
    for step, node in enumerate(order):
        environment.add(node)
        yield bytes_of(joint, {*environment, *held})
        later = {u for i in order[step + 1 :] for u in joint.inputs[i]}
        environment &= {*later, *returned}


def bytes_of(joint: JointGraph, nodes: set[int]) -> int:
    storages = {s for i in nodes for s in joint.storage_of[i]}
    return sum(joint.storages[s].nbytes for s in storages if not joint.storages[s].resident)


def legal_saved_set(problem: Problem, data: st.DataObject) -> frozenset[int]:
    wanted = data.draw(st.sets(st.sampled_from(savable(problem) or [-1]))) - {-1}
    return problem.evaluate(wanted, "random").saved


def unfused(schedule: Schedule) -> Liveness:
    return analyse(schedule, [0] * len(schedule.joint), fused=False)


@settings(max_examples=15)
@given(programs(names=(*OPERATORS, *RANDOM), is_loss=True), st.data())
def test_the_unfused_model_is_what_reference_counting_does(
    program: Program, data: st.DataObject
) -> None:
    problem = problem_of(program, *program.arguments())
    for _ in range(3):
        schedule = make_schedule(problem.joint, legal_saved_set(problem, data))
        assert unfused(schedule).live_bytes == list(simulate(schedule))


def measured_peak(captured: Captured, arguments: list[torch.Tensor]) -> int:
    """Exact allocator bytes of the second step; the first one compiles."""

    def step() -> object:
        (loss,) = captured(*arguments)
        return loss, torch.autograd.grad(loss, arguments, allow_unused=True)

    step()
    with Meter() as meter:
        held = step()
    del held
    return meter.peak_bytes


@settings(max_examples=15)
@given(programs(names=SCRATCHLESS, is_loss=True), st.sampled_from(BUDGETS))
def test_the_predicted_peak_is_the_measured_one_to_the_byte(
    program: Program, budget: float | str | None
) -> None:
    captured = lowered(program, memory_budget=budget)
    measured = measured_peak(captured, program.arguments())
    predicted = captured.outcome.chosen.peak_bytes
    assert 0 <= measured - predicted <= UNSEEN_BYTES


@settings(max_examples=15)
@given(programs(names=(*OPERATORS, *RANDOM), is_loss=True), st.data())
def test_a_timeline_adds_up_to_the_live_bytes(program: Program, data: st.DataObject) -> None:
    problem = problem_of(program, *program.arguments())
    schedule = make_schedule(problem.joint, legal_saved_set(problem, data))
    scratch = data.draw(
        st.lists(st.integers(0, 4096), min_size=len(problem.joint), max_size=len(problem.joint))
    )
    for fused in (False, True):
        liveness = analyse(schedule, scratch, fused=fused)
        timeline = liveness.timeline("plan")
        assert list(timeline.live_bytes) == liveness.live_bytes
        assert timeline.peak_bytes == liveness.peak_bytes
        boundary = len(schedule.forward)
        assert [s.backward for s in timeline.steps] == [
            step >= boundary for step in range(len(timeline.steps))
        ]


@settings(max_examples=15)
@given(programs(names=(*OPERATORS, *RANDOM), is_loss=True), st.data())
def test_fusion_leaves_out_values_and_nothing_that_a_library_call_reads(
    program: Program, data: st.DataObject
) -> None:
    problem = problem_of(program, *program.arguments())
    joint = problem.joint
    schedule = make_schedule(joint, legal_saved_set(problem, data))
    fused = analyse(schedule, [0] * len(joint), fused=True)
    born = {(s, first) for s, first, _ in unfused(schedule).lives}
    assert {(s, first) for s, first, _ in fused.lives} <= born
    alive = {(s, step) for s, first, last in fused.lives for step in range(first, last + 1)}
    for step, i in enumerate((*schedule.forward, *schedule.backward)):
        if joint.kind[i] is OpKind.EXTERN:
            read = storages_of(joint, joint.inputs[i])
            assert {(s, step) for s in read} <= alive, joint.nodes[i]


def test_a_view_costs_nothing_and_keeps_its_base_alive() -> None:
    def function(x: torch.Tensor) -> torch.Tensor:
        wide = x.repeat(4, 1)
        row = wide[0]
        other = x.sin()
        return (row * other).sum()

    x = torch.randn(16, 16, dtype=torch.float64, requires_grad=True)
    problem = problem_of(function, x)
    joint = problem.joint
    (wide,) = (i for i, n in enumerate(joint.nodes) if "repeat" in n.name)
    row = next(
        i for i in joint.index.values() if i > wide and joint.nodes[i].op == "call_function"
    )
    assert joint.storage_of[row] == joint.storage_of[wide]
    assert joint.allocates[row] == ()


def test_scratch_counts_at_its_own_step_only() -> None:
    program = Program((("matmul", 0, 1), ("tanh", 2, 2), ("matmul", 3, 1)), is_loss=True)
    problem = problem_of(program, *program.arguments())
    schedule = make_schedule(problem.joint, problem.keep_everything().saved)
    plain = unfused(schedule).live_bytes
    node = schedule.backward[1]
    scratch = [0] * len(problem.joint)
    scratch[node] = 12345
    step = len(schedule.forward) + 1
    with_scratch = analyse(schedule, scratch, fused=False).live_bytes
    assert [b - a for a, b in zip(plain, with_scratch, strict=True)] == [
        12345 * (i == step) for i in range(len(plain))
    ]


@pytest.mark.parametrize("fused", [False, True])
def test_what_the_caller_holds_stays_alive_to_the_end(fused: bool) -> None:
    program = Program((("matmul", 0, 1), ("tanh", 2, 2)), outputs=2)
    problem = problem_of(program, *program.arguments())
    schedule = make_schedule(problem.joint, problem.keep_everything().saved)
    liveness = analyse(schedule, [0] * len(problem.joint), fused=fused)
    last_step = len(liveness.workspace) - 1
    held = {s for i in problem.joint.forward_outputs for s in problem.joint.storage_of[i]}
    assert held
    assert held <= {s for s, _, last in liveness.lives if last == last_step}
