"""A collective's memory, from its start to its wait, on a group of one process."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, fx
from torch._C._distributed_c10d import HashStore
from torch.distributed import _functional_collectives as collectives
from torch.utils.checkpoint import checkpoint

from memopt.backend import read_options
from memopt.graph import awaited, is_collective, is_wait
from memopt.lowering import lower_eagerly
from memopt.memory.liveness import analyse
from memopt.memory.schedule import make_schedule
from memopt.pipeline import PassContext
from memopt.planner.problem import Problem
from memopt.splitting import Splitter
from tests.distributed_models import of_all_rows
from tests.graphs import problem_of, savable

SIDE = 32
NBYTES = SIDE * SIDE * 8


@pytest.fixture(scope="module")
def group() -> Iterator[None]:
    """Of this process alone."""
    dist.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def problem(group: None) -> Problem:
    """A gathered product, which the backward reads as it came, and its gradient scattered."""

    def step(x: Tensor, weight: Tensor) -> Tensor:
        group = dist.group.WORLD
        assert group is not None
        whole: Tensor = collectives.all_gather_tensor_autograd(x @ x, 0, group)
        return (whole @ weight).sin().sum()

    matrices = (torch.randn(SIDE, SIDE, dtype=torch.float64) for _ in range(2))
    return problem_of(step, *(m.requires_grad_() for m in matrices))


def test_a_collective_of_the_backward_stays_there_under_every_plan(group: None) -> None:
    """It reads no gradient, so it could run in the forward: on one rank, and not on all."""

    matrices = [torch.randn(SIDE, SIDE, dtype=torch.float64) for _ in range(4)]
    problem = problem_of(of_all_rows, *(m.requires_grad_() for m in matrices))
    joint = problem.joint
    started = [joint.index[awaited(joint.nodes[wait])] for wait in waits(problem)]
    assert len(started) == 6
    everything = [i for i in range(len(joint)) if problem.save_bytes[i] < float("inf")]
    for saved in ([], everything, started, waits(problem), savable(problem)):
        schedule = problem.evaluate(saved, "a test").liveness.schedule
        assert [i for i in schedule.backward if i in started] == started
        assert not {*schedule.forward}.intersection(started)


def gathered_input(x: Tensor, weight: Tensor) -> Tensor:
    """The backward needs what was made of the gathered, and could gather again, twice."""
    group = dist.group.WORLD
    assert group is not None
    for _ in range(2):
        x = collectives.all_gather_tensor_autograd(x.sin(), 0, group).cos()
    return (x @ weight).sum()


@pytest.mark.parametrize("budget", [None, "min", 0.9])
@pytest.mark.parametrize("function", [of_all_rows, gathered_input])
def test_a_collective_is_in_one_half(
    group: None, function: Callable[..., Tensor], budget: Any
) -> None:
    """Torch's extraction keeps waits in both, where nothing reads them."""
    halves: list[fx.GraphModule] = []

    class Kept(Splitter):
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            halves.extend(super().__call__(*args, **kwargs))
            return tuple(halves)

    config = read_options({"lowering": "eager", "memory_budget": budget})

    def backend(gm: fx.GraphModule, inputs: Sequence[Any]) -> Any:
        return lower_eagerly(gm, inputs, Kept(config, PassContext(config)))

    x = torch.randn(SIDE, SIDE, dtype=torch.float64)
    torch.compile(function, backend=backend)(x, torch.randn_like(x).requires_grad_()).backward()
    forward, backward = ([n.name for n in half.graph.nodes if is_collective(n)] for half in halves)
    assert len({*forward, *backward}) == len(forward) + len(backward)
    assert bool(forward) == (function is gathered_input)
    assert bool(backward) == (function is of_all_rows)


def test_a_checkpoint_around_a_collective_does_not_run_it_again(group: None) -> None:
    def gathered(x: Tensor) -> Tensor:
        whole: Tensor = collectives.all_gather_tensor_autograd(x.sin(), 0, dist.group.WORLD)
        return whole.sin()

    def step(x: Tensor) -> Tensor:
        y: Tensor = checkpoint(gathered, x, use_reentrant=False)
        return (y @ y).sum()

    problem = problem_of(step, torch.randn(SIDE, SIDE, dtype=torch.float64, requires_grad=True))
    joint = problem.joint
    started = [joint.index[awaited(joint.nodes[wait])] for wait in waits(problem)]
    schedule = problem.evaluate([], "a test").liveness.schedule
    assert len(started) == 2
    assert [i for i in (*schedule.forward, *schedule.backward) if i in started] == started


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
