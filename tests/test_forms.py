"""Values that are held in another form: the same numbers, and the bytes that the model says."""

import math
import tempfile
from itertools import combinations
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import fx

from memopt import splitting
from memopt._torch import BackendCompilerFailed
from memopt.cost import CostModel
from memopt.device import DEVICES
from memopt.joint import JointGraph
from memopt.kernels.files import files_in
from memopt.kernels.host import ARENA
from memopt.memory.schedule import make_schedule
from memopt.partition import partition
from memopt.planner.problem import Candidate, Problem
from memopt.planner.search import Search
from tests.graphs import (
    MASKED,
    OPERATORS,
    SIZE,
    Program,
    assert_same,
    is_legal,
    lowered,
    problem_of,
    programs,
    savable,
    saved_sets,
    seeded,
)
from tests.test_liveness import UNSEEN_BYTES, measured_peak, simulate, unfused

PACKED = {"pack_masks": {"least": 8, "cpu": True}}
AWAY = {"offload": {"simulate": True, "least": 8, "bandwidth": 1e9}}
INSTANTLY = {"offload": {"simulate": True, "least": 8, "bandwidth": 1e30}}
FORMS = [PACKED, AWAY, INSTANTLY, {**PACKED, **AWAY}]
Passes = dict[str, dict[str, Any]]
BUDGETS = (0.9, 0.7, 0.5, "min")
# "dropout" has scratch of its own in the eager lowering.
SCRATCHLESS = (*OPERATORS, "where")


def offered(program: Program, **options: Any) -> Problem:
    """The priced joint graph, with bits of every mask in it."""
    options = {"memory_budget": "min", "passes": PACKED, **options}
    return problem_of(program, *program.arguments(), **options)


@settings(max_examples=25)
@given(programs(names=(*OPERATORS, *MASKED)), st.sampled_from(BUDGETS), st.sampled_from(FORMS))
def test_outputs_and_gradients_are_those_of_eager(
    program: Program, budget: float | str, passes: Passes
) -> None:
    arguments = program.arguments()
    compiled = lowered(program, memory_budget=budget, passes=passes)
    assert_same(seeded(compiled, arguments), seeded(program, arguments))


@settings(max_examples=25)
@given(programs(names=SCRATCHLESS, is_loss=True), st.sampled_from(BUDGETS), st.sampled_from(FORMS))
def test_the_predicted_peak_is_the_measured_one_to_the_byte(
    program: Program, budget: float | str, passes: Passes
) -> None:
    captured = lowered(program, memory_budget=budget, passes=passes)
    measured = measured_peak(captured, program.arguments())
    assert 0 <= measured - captured.outcome.chosen.peak_bytes <= UNSEEN_BYTES


@settings(max_examples=15)
@given(programs(names=(*OPERATORS, *MASKED), is_loss=True), st.sampled_from(FORMS))
def test_the_backward_runs_in_the_order_of_the_schedule(program: Program, passes: Passes) -> None:
    """Forms included: where a copy back starts is the plan's."""
    halves: list[fx.GraphModule] = []

    def keeping(*args: Any, **options: Any) -> Any:
        halves.extend(made := partition(*args, **options))
        return made

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(splitting, "partition", keeping)
        captured = lowered(program, memory_budget=0.5, passes=passes)
        try:
            captured(*program.arguments())
        except BackendCompilerFailed:
            return  # no plan fits
    problem, schedule = captured.problem, captured.outcome.chosen.liveness.schedule
    names = [problem.joint.nodes[i].name for i in schedule.backward]
    runs = [node.name for node in halves[1].graph.nodes if node.name in names]
    assert runs == [name for name in names if name in runs]
    decoded = {problem.joint.nodes[e.decoded].name for e in problem.joint.encodings}
    assert decoded.intersection(names) <= set(runs)


@settings(max_examples=15)
@given(programs(names=SCRATCHLESS, is_loss=True), st.sampled_from(BUDGETS))
def test_the_host_holds_what_the_plan_says_and_nothing_after_the_step(
    program: Program, budget: float | str
) -> None:
    captured = lowered(program, memory_budget=budget, passes=AWAY)
    arguments = program.arguments()
    measured_peak(captured, arguments)
    ARENA.peak_bytes = ARENA.held_bytes
    assert ARENA.held_bytes == 0
    measured_peak(captured, arguments)
    problem, saved = captured.problem, captured.outcome.chosen.saved
    assert ARENA.peak_bytes == problem.away_bytes(saved)["offload"]
    assert ARENA.held_bytes == 0


@settings(max_examples=15)
@given(programs(names=SCRATCHLESS, is_loss=True), st.integers(1, 4))
def test_the_host_never_holds_more_than_it_may(program: Program, matrices: int) -> None:
    limit = matrices * SIZE * SIZE * 8
    passes = {"offload": {**INSTANTLY["offload"], "host_bytes": limit}}
    problem = offered(program, passes=passes)
    everything = problem.evaluate(choices(problem.joint), "all away")
    assert problem.away_bytes(everything.saved)["offload"] <= limit


@settings(max_examples=15)
@given(
    program=programs(names=SCRATCHLESS, is_loss=True),
    matrices=st.integers(1, 4),
    disk=st.integers(1, 4) | st.none(),
    data=st.data(),
)
def test_files_take_what_the_host_has_no_room_for(
    program: Program,
    matrices: int,
    disk: int | None,
    data: st.DataObject,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    limit, room = matrices * SIZE * SIZE * 8, disk and disk * SIZE * SIZE * 8
    directory = str(tmp_path_factory.getbasetemp())
    files = {"directory": directory, "least": 8, "bandwidth": 1e9, "file_bytes": room}
    passes = {
        "offload": {**INSTANTLY["offload"], "host_bytes": limit},
        "offload_to_files": {k: v for k, v in files.items() if v is not None},
    }
    problem = offered(program, passes=passes)
    on_host = [e for e in problem.joint.encodings if e.kind == "offload"]
    drawn = data.draw(st.sets(st.sampled_from(on_host)) if on_host else st.just(set()))
    read = make_schedule(problem.joint, [e.encoded for e in drawn]).saved
    wanted = [e for e in drawn if e.encoded in read]
    chosen = problem.evaluate([e.encoded for e in wanted], "away").saved
    held = problem.away_bytes(chosen)
    assert held["offload"] <= limit
    assert room is None or held["file"] <= room
    away = [e for e in problem.joint.encodings if e.encoded in chosen]
    if room is None:
        assert {e.source for e in away} == {e.source for e in wanted}
    left = limit - held["offload"]
    assert all(e.host_nbytes > left for e in away if e.kind == "file")


def test_the_first_values_go_to_files() -> None:
    program = Program(tuple(("matmul", i, i) for i in range(1, 6)), is_loss=True)
    matrix = SIZE * SIZE * 8
    files = {"directory": tempfile.gettempdir(), "least": 8}
    passes = {
        "offload": {**INSTANTLY["offload"], "host_bytes": 2 * matrix},
        "offload_to_files": files,
    }
    problem = offered(program, passes=passes)
    matrices = [e for e in problem.joint.encodings if e.host_nbytes == matrix]
    wanted = [e.encoded for e in matrices if e.kind == "offload"]
    chosen = problem.evaluate(wanted, "away").saved
    away = sorted((e for e in matrices if e.encoded in chosen), key=lambda e: e.source)
    assert len(away) > 3
    assert [e.kind for e in away] == ["file"] * (len(away) - 2) + ["offload"] * 2


@settings(max_examples=15)
@given(program=programs(names=SCRATCHLESS, is_loss=True), budget=st.sampled_from(BUDGETS))
def test_files_hold_what_the_plan_says_and_nothing_after_the_step(
    program: Program, budget: float | str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    directory = str(tmp_path_factory.getbasetemp())
    passes = {"offload_to_files": {"directory": directory, "least": 8, "bandwidth": 1e12}}
    captured = lowered(program, memory_budget=budget, passes=passes)
    arguments = program.arguments()
    assert_same(seeded(captured, arguments), seeded(program, arguments))
    arena = files_in(directory).arena
    arena.peak_bytes = arena.held_bytes
    assert arena.held_bytes == 0
    measured = measured_peak(captured, arguments)
    assert 0 <= measured - captured.outcome.chosen.peak_bytes <= UNSEEN_BYTES
    assert arena.peak_bytes == captured.problem.away_bytes(captured.outcome.chosen.saved)["file"]
    assert arena.held_bytes == 0


def choices(joint: JointGraph) -> list[int]:
    return [e.encoded for e in joint.encodings]


@settings(max_examples=25)
@given(programs(names=(*OPERATORS, *MASKED), is_loss=True), st.data())
def test_the_model_is_what_reference_counting_does(program: Program, data: st.DataObject) -> None:
    problem = offered(program, passes=data.draw(st.sampled_from(FORMS)))
    candidates = [*savable(problem), *choices(problem.joint)]
    wanted = data.draw(st.sets(st.sampled_from(candidates or [-1]))) - {-1}
    schedule = make_schedule(problem.joint, problem.evaluate(wanted, "random").saved)
    assert unfused(schedule).live_bytes == list(simulate(schedule))


@settings(max_examples=25)
@given(programs(names=(*OPERATORS, *MASKED), is_loss=True), st.data())
def test_a_value_is_held_once(program: Program, data: st.DataObject) -> None:
    problem = offered(program)
    joint = problem.joint
    candidates = [*savable(problem), *choices(joint)]
    wanted = data.draw(st.sets(st.sampled_from(candidates or [-1]))) - {-1}
    saved = problem.evaluate(wanted, "random").saved
    for encoding in joint.encodings:
        assert not {encoding.source, encoding.encoded} <= saved


def test_everything_kept_is_kept_as_it_is() -> None:
    program = Program((("where", 0, 1), ("dropout", 2, 2), ("where", 3, 1)), is_loss=True)
    problem, plain = offered(program), problem_of(program, *program.arguments())
    assert problem.joint.encodings
    assert not plain.joint.encodings
    kept = problem.keep_everything()
    assert not kept.saved & set(choices(problem.joint))
    assert kept.peak_bytes == plain.keep_everything().peak_bytes


def every_plan(problem: Problem) -> list[Candidate]:
    """Every legal saved set, in every form."""
    joint = problem.joint
    forms = choices(joint)
    plans = [
        problem.evaluate(saved.union(held), "brute force")
        for saved in saved_sets([i for i in savable(problem) if i not in forms])
        for count in range(len(forms) + 1)
        for held in combinations(forms, count)
    ]
    return [plan for plan in plans if is_legal(plan.liveness.schedule, problem)]


PROGRAMS = (
    Program((("where", 0, 1), ("where", 2, 2)), is_loss=True),
    Program((("dropout", 0, 0), ("dropout", 2, 2)), is_loss=True),
    Program((("where", 0, 1), ("matmul", 2, 0), ("dropout", 3, 3)), is_loss=True),
)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("program", PROGRAMS)
def test_the_search_finds_the_lowest_peak_there_is(program: Program, fused: bool) -> None:
    problem = Problem(offered(program).joint, CostModel(DEVICES["cpu"], fused))
    lowest = min(plan.peak_bytes for plan in every_plan(problem))
    assert Search(problem).floor.peak_bytes == lowest


@pytest.mark.parametrize("program", PROGRAMS)
def test_no_plan_under_a_budget_is_faster_than_the_one_found(program: Program) -> None:
    problem = Problem(offered(program).joint, CostModel(DEVICES["cpu"], fused=True))
    plans = every_plan(problem)
    lowest = min(plan.peak_bytes for plan in plans)
    highest = problem.keep_everything().peak_bytes
    for fraction in (0.2, 0.5, 0.8):
        budget = math.ceil(lowest + fraction * (highest - lowest))
        found = Search(problem).plan(budget)
        best = min(plan.seconds for plan in plans if plan.peak_bytes <= budget)
        assert found is not None
        assert found.peak_bytes <= budget
        assert found.seconds <= best * (1 + 1e-9)
