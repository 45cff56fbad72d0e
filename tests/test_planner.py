"""Plans against every saved set there is, on graphs small enough to try them all."""

import functools
from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memopt.cost import CostModel
from memopt.device import DEVICES
from memopt.planner.problem import Candidate, Problem
from memopt.planner.search import Search
from tests.graphs import (
    OPERATORS,
    RANDOM,
    Program,
    is_legal,
    problem_of,
    programs,
    random_program,
    savable,
    saved_sets,
)

MOST_SAVABLE = 8
FRACTIONS = (0.0, 0.1, 0.3, 0.5, 0.8, 1.0)
# Random programs by number, all with few enough values to save that every set can be tried.
SEEDS = (0, 1, 3, 4, 5, 6, 8, 9, 10, 11, 12, 13, 15, 17)
# The smallest programs whose optimum lies on no uniform level, then random ones.
PROGRAMS = (
    Program((("softmax", 0, 0), ("softmax", 2, 2)), is_loss=True),
    Program((("wide", 0, 0), ("softmax", 0, 2), ("reshape", 3, 2)), is_loss=True),
    *(random_program(n, names=(*OPERATORS, *RANDOM), steps=3 + n % 4) for n in SEEDS),
)


@dataclass(frozen=True)
class Exhausted:
    """A problem with every legal plan of it."""

    problem: Problem
    plans: tuple[Candidate, ...]

    @property
    def lowest_bytes(self) -> int:
        """The true floor."""
        return min(plan.peak_bytes for plan in self.plans)

    def between(self, fraction: float) -> int:
        """A budget between the true floor and what keeping everything needs."""
        highest = self.problem.keep_everything().peak_bytes
        return int(self.lowest_bytes + fraction * (highest - self.lowest_bytes))


@functools.cache
def exhausted(program: Program, fused: bool) -> Exhausted:
    """Every legal saved set, evaluated; the graph is traced without a fusing lowering."""
    joint = problem_of(program, *program.arguments()).joint
    problem = Problem(joint, CostModel(DEVICES["cpu"], fused))
    candidates = savable(problem)
    assert len(candidates) <= MOST_SAVABLE, f"too many to try all sets: {len(candidates)}"
    plans = [problem.evaluate(s, "brute force") for s in saved_sets(candidates)]
    legal = [plan for plan in plans if is_legal(plan.liveness.schedule, problem)]
    return Exhausted(problem, tuple(legal))


@pytest.fixture(params=PROGRAMS, ids=lambda p: "-".join(name for name, _, _ in p.steps))
def program(request: pytest.FixtureRequest) -> Program:
    drawn: Program = request.param
    return drawn


@pytest.fixture(params=[False, True], ids=["unfused", "fused"])
def every(request: pytest.FixtureRequest, program: Program) -> Exhausted:
    return exhausted(program, request.param)


def plans_of(search: Search, every: Exhausted) -> list[tuple[int, Candidate]]:
    """Budgets with their plans: none below the search's own floor, one from there on."""
    found = {budget: search.plan(budget) for budget in map(every.between, FRACTIONS)}
    for budget, plan in found.items():
        assert (plan is None) == (search.floor.peak_bytes > budget)
    pairs = [(budget, plan) for budget, plan in found.items() if plan is not None]
    assert pairs, "a budget that keeps everything has a plan"
    return pairs


def test_a_plan_is_legal_within_budget_and_no_dearer_than_any_uniform_level(
    every: Exhausted,
) -> None:
    search = Search(every.problem)
    for budget, plan in plans_of(search, every):
        assert plan.peak_bytes <= budget
        assert is_legal(plan.liveness.schedule, every.problem)
        fresh = every.problem.evaluate(plan.saved, "again")
        assert (fresh.peak_bytes, fresh.seconds) == (plan.peak_bytes, plan.seconds)
        uniform = [level.seconds for level in search.levels if level.peak_bytes <= budget]
        assert plan.seconds <= min(uniform, default=plan.seconds)


def test_no_plan_beats_brute_force(every: Exhausted) -> None:
    search = Search(every.problem)
    assert search.floor.peak_bytes >= every.lowest_bytes
    for budget, plan in plans_of(search, every):
        best = min(p.seconds for p in every.plans if p.peak_bytes <= budget)
        assert plan.seconds >= best * (1 - 1e-9)


def test_where_a_plan_exists_one_is_found_at_a_twentieth_more(every: Exhausted) -> None:
    budget = every.lowest_bytes * 21 // 20
    assert Search(every.problem).plan(budget) is not None


def test_two_searches_find_the_same_plan(every: Exhausted) -> None:
    one, two = (plans_of(Search(every.problem), every) for _ in range(2))
    assert [(b, p.saved) for b, p in one] == [(b, p.saved) for b, p in two]


def test_without_a_budget_the_plan_is_as_fast_as_any(every: Exhausted) -> None:
    plan = Search(every.problem).plan(None)
    assert plan is not None
    assert plan.seconds == pytest.approx(min(p.seconds for p in every.plans), rel=1e-6, abs=0)


def test_keeping_everything_runs_nothing_but_views_twice(every: Exhausted) -> None:
    assert every.problem.keep_everything().recompute_seconds == 0


def test_keeping_everything_keeps_only_what_the_forward_makes_anyway(every: Exhausted) -> None:
    kept = every.problem.keep_everything()
    joint = every.problem.joint
    owners = {joint.storages[s].owner for i in kept.saved for s in joint.storage_of[i]}
    assert all(joint.required_forward[i] for i in owners)


@settings(max_examples=12)
@given(programs(names=(*OPERATORS, *RANDOM), is_loss=True), st.data())
def test_any_saved_set_is_made_legal_and_only_what_nobody_reads_is_taken_from_it(
    program: Program, data: st.DataObject
) -> None:
    problem = problem_of(program, *program.arguments())
    wanted = data.draw(st.sets(st.sampled_from(savable(problem) or [0])))
    candidate = problem.evaluate(wanted, "random")
    schedule = candidate.liveness.schedule
    assert is_legal(schedule, problem)
    read = {u for i in schedule.backward for u in problem.joint.inputs[i]}
    values = {i for i in wanted if problem.joint.nodes[i].op != "placeholder"}
    assert values & read <= candidate.saved <= {*read, *problem.joint.backward_outputs}


@pytest.mark.parametrize("name", sorted(RANDOM))
def test_a_random_draw_runs_once_at_the_lowest_budget(name: str) -> None:
    program = Program(((name, 0, 1), ("matmul", 2, 1), (name, 3, 1)), is_loss=True)
    problem = problem_of(program, *program.arguments())
    draws = {
        i
        for i, n in enumerate(problem.joint.nodes)
        if not problem.joint.recomputable[i] and n.op == "call_function"
    }
    assert len(draws) == 2
    floor = Search(problem).floor
    assert not draws & set(floor.liveness.schedule.recomputed)


def test_without_a_budget_a_plan_costs_no_time_over_the_fast_one(every: Exhausted) -> None:
    search = Search(every.problem)
    plan = search.plan(None)
    assert plan is not None
    assert plan.seconds <= search.fastest.seconds
    lower = plan.peak_bytes < search.fastest.peak_bytes
    assert lower or plan.saved == search.fastest.saved


def test_without_a_budget_nothing_runs_again_that_the_fast_one_keeps(every: Exhausted) -> None:
    kept = every.problem.keep_everything()
    plan = Search(every.problem, fastest=kept.saved).plan(None)
    assert plan is not None
    assert plan.recompute_seconds == 0
