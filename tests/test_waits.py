"""A collective's memory, from its start to its wait, on a group of one process."""

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import HashStore
from torch.distributed import _functional_collectives as collectives

from memopt.graph import awaited, is_wait
from memopt.memory.liveness import analyse
from memopt.memory.schedule import make_schedule
from memopt.planner.problem import Problem
from tests.graphs import problem_of, savable

SIDE = 32
NBYTES = SIDE * SIDE * 8


@pytest.fixture(scope="module")
def problem() -> Iterator[Problem]:
    """A gathered product, which the backward reads as it came, and its gradient scattered."""

    def step(x: Tensor, weight: Tensor) -> Tensor:
        group = dist.group.WORLD
        assert group is not None
        whole: Tensor = collectives.all_gather_tensor_autograd(x @ x, 0, group)
        return (whole @ weight).sin().sum()

    dist.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    try:
        matrices = (torch.randn(SIDE, SIDE, dtype=torch.float64) for _ in range(2))
        yield problem_of(step, *(m.requires_grad_() for m in matrices))
    finally:
        dist.destroy_process_group()


def waits(problem: Problem) -> list[int]:
    return [i for i, node in enumerate(problem.joint.nodes) if is_wait(node)]


def test_what_is_gathered_is_in_memory_once(problem: Problem) -> None:
    joint = problem.joint
    assert len(waits(problem)) == 2  # of the gather, and of its gradient's scatter
    for wait in waits(problem):
        (started,) = joint.inputs[wait]
        assert joint.storage_of[wait] == joint.storage_of[started]
        assert not joint.allocates[wait]


def test_the_wait_is_saved_and_not_what_is_on_its_way(problem: Problem) -> None:
    wait = waits(problem)[0]
    (started,) = problem.joint.inputs[wait]
    assert wait in savable(problem)
    assert started not in savable(problem)
    kept = problem.keep_everything()
    assert wait in kept.saved
    assert kept.liveness.schedule.recomputed == ()


def test_collectives_run_once_and_in_order_under_every_plan(problem: Problem) -> None:
    joint = problem.joint
    started = [joint.index[awaited(joint.nodes[wait])] for wait in waits(problem)]
    for saved in ([], savable(problem), savable(problem)[:1]):
        schedule = problem.evaluate(saved, "a test").liveness.schedule
        steps = [*schedule.forward, *schedule.backward]
        assert [i for i in steps if i in started] == started


def test_what_is_sent_is_alive_until_the_wait(problem: Problem) -> None:
    joint, wait = problem.joint, waits(problem)[0]
    (sent,) = joint.inputs[joint.index[awaited(joint.nodes[wait])]]
    schedule = make_schedule(joint, savable(problem))
    liveness = analyse(schedule, [0] * len(schedule.joint), fused=True)
    (storage,) = joint.storage_of[sent]
    at = schedule.forward.index(wait)
    (last,) = [last for s, _, last in liveness.lives if s == storage and last < len(joint)][:1]
    assert last == at
    assert liveness.live_bytes[at] == 2 * NBYTES  # what is sent, and what is gathered once
