"""Random differentiable functions as data, and the joint graphs that tracing makes of them.

A ``Program`` is a straight line of operators over square matrices, so hypothesis can shrink it
and a failure prints what to run. Every operator has a known amount of scratch: none.
"""

import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from hypothesis import strategies as st
from torch import nn

from memopt.backend import read_options
from memopt.lowering import lower_eagerly
from memopt.memory.schedule import Schedule
from memopt.outcome import Outcome
from memopt.pipeline import PassContext
from memopt.planner.problem import Problem
from memopt.splitting import Splitter

Tensor = torch.Tensor
SIZE = 16
HALF = SIZE // 2

OPERATORS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "matmul": lambda x, y: x @ y / SIZE,
    "add": torch.add,
    "mul": torch.mul,
    "tanh": lambda x, y: x.tanh(),
    "sigmoid": lambda x, y: x.sigmoid(),
    "softmax": lambda x, y: x.softmax(-1),
    "centre": lambda x, y: x - x.mean(-1, keepdim=True),
    "scale_by_sum": lambda x, y: x * y.sum(0, keepdim=True).tanh(),
    "transpose": lambda x, y: x.t(),
    "reshape": lambda x, y: x.reshape(HALF, 2 * SIZE).sin().reshape(SIZE, SIZE),
    "halves": lambda x, y: torch.cat([x[:, HALF:], y[:, :HALF]], 1),
    "row": lambda x, y: x + y[0],
    "columns": lambda x, y: x[:, :4] @ y[:4] / 4,
    "wide": lambda x, y: torch.cat([x, y], 1).tanh() @ torch.cat([y, x], 0) / SIZE,
    "chunk": lambda x, y: torch.mul(*torch.cat([x, y]).chunk(2)),
}
RANDOM: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "dropout": lambda x, y: nn.functional.dropout(x, 0.5, training=True),
    "noise": lambda x, y: x * torch.rand_like(x),
}


MASKED: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "where": lambda x, y: torch.where(x > 0.1, x, y),
    "dropout": RANDOM["dropout"],
}


@dataclass(frozen=True)
class Program:
    """Operator by operator: each reads two earlier values, the last ones are returned.

    Attributes:
        steps: operator name and the positions of its two inputs among the values so far.
        outputs: how many of the last values the function returns.
        inputs: how many matrices it takes.
        is_loss: whether it returns one number, as training has it, made of those values.
        live: the steps that the result is made of. Only these run: eager draws numbers for the
            others too, and a compiler need not.
    """

    steps: tuple[tuple[str, int, int], ...]
    outputs: int = 1
    inputs: int = 2
    is_loss: bool = False
    live: tuple[bool, ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        reads = [*([()] * self.inputs), *((left, right) for _, left, right in self.steps)]
        used = ancestors(reads, range(len(reads) - self.outputs, len(reads)))
        live = tuple(position in used for position in range(self.inputs, len(reads)))
        object.__setattr__(self, "live", live)

    def __call__(self, *matrices: Tensor) -> tuple[Tensor, ...]:
        values = list(matrices)
        for (name, left, right), live in zip(self.steps, self.live, strict=True):
            operator = (OPERATORS | RANDOM | MASKED)[name]
            values.append(operator(values[left], values[right]) if live else values[0])
        last = values[-self.outputs :]
        return (torch.stack([(v * v).sum() for v in last]).sum(),) if self.is_loss else tuple(last)

    def arguments(self, dtype: torch.dtype = torch.float64) -> list[Tensor]:
        """Leaves to differentiate by."""
        generator = torch.Generator().manual_seed(7)
        return [
            torch.randn(SIZE, SIZE, generator=generator, dtype=dtype).requires_grad_()
            for _ in range(self.inputs)
        ]


@st.composite
def programs(
    draw: st.DrawFn,
    *,
    names: Iterable[str] = tuple(OPERATORS),
    least: int = 2,
    most: int = 10,
    is_loss: bool = False,
) -> Program:
    """Programs whose inputs mostly are recent values, so that they are deep and share much."""
    inputs = 2
    steps = []
    for position in range(draw(st.integers(least, most))):
        known = inputs + position
        left = draw(st.integers(max(0, known - 3), known - 1))
        right = draw(st.integers(0, known - 1))
        steps.append((draw(st.sampled_from(sorted(names))), left, right))
    outputs = draw(st.integers(1, min(2, len(steps))))
    return Program(tuple(steps), outputs, inputs, is_loss)


def random_program(seed: int, *, names: Iterable[str], steps: int) -> Program:
    """One program by number, for tests that share what they computed about it."""
    rng, names = random.Random(seed), sorted(names)
    body = []
    for known in range(2, 2 + steps):
        left, right = rng.randint(max(0, known - 3), known - 1), rng.randrange(known)
        body.append((rng.choice(names), left, right))
    return Program(tuple(body), is_loss=True)


@dataclass(frozen=True)
class Captured:
    """A function compiled with the eager lowering, and what planning it came to."""

    function: Callable[..., Any]
    splits: list[Splitter]

    def __call__(self, *args: Any) -> Any:
        result = self.function(*args)
        assert self.splits, "Dynamo compiled nothing, and ran the function as it is"
        return result

    @property
    def outcome(self) -> Outcome:
        """The planning of the first joint graph."""
        return next(outcome for split in self.splits for outcome in split.outcomes)

    @property
    def problem(self) -> Problem:
        """The first joint graph, priced."""
        return self.outcome.problem


def lowered(function: Callable[..., Any], **options: object) -> Captured:
    """``function`` compiled with the eager lowering; it plans at the first call."""
    config = read_options({"lowering": "eager", **options})
    splits: list[Splitter] = []

    def backend(gm: torch.fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        splits.append(Splitter(config, PassContext(config)))
        return lower_eagerly(gm, inputs, splits[-1])

    torch._dynamo.reset()
    return Captured(torch.compile(function, backend=backend, dynamic=False), splits)


def problem_of(function: Callable[..., Any], *inputs: Any, **options: object) -> Problem:
    """The priced joint graph of ``function`` at ``inputs``."""
    captured = lowered(function, **options)
    captured(*inputs)
    return captured.problem


def saved_sets(candidates: Sequence[int]) -> list[frozenset[int]]:
    """Every subset of ``candidates``."""
    return [
        frozenset(c for bit, c in enumerate(candidates) if mask >> bit & 1)
        for mask in range(1 << len(candidates))
    ]


def ancestors(
    inputs: Sequence[Sequence[int]], roots: Iterable[int], stop: Iterable[int] = ()
) -> set[int]:
    """The roots and all they are made from, not looking past ``stop``."""
    held, seen, pending = set(stop), set[int](), list(roots)
    while pending:
        node = pending.pop()
        if node not in seen:
            seen.add(node)
            pending += () if node in held else inputs[node]
    return seen


def is_legal(schedule: Schedule, problem: Problem) -> bool:
    """Whether nothing that must run once runs twice."""
    return all(problem.recompute_price[i] != float("inf") for i in schedule.recomputed)


def savable(problem: Problem) -> list[int]:
    """Nodes whose saving costs bytes and that the backward could make use of."""
    useful = ancestors(problem.joint.inputs, problem.needed)
    return [i for i in sorted(useful) if 0 < problem.save_bytes[i] < float("inf")]


def gradients(outputs: Sequence[Tensor], inputs: Sequence[Tensor]) -> list[Tensor]:
    """Gradients of a fixed weighting of the outputs; zeros where an input plays no part."""
    weights = [torch.linspace(-1, 1, o.numel(), dtype=o.dtype).view(o.shape) for o in outputs]
    pairs = [(o, w) for o, w in zip(outputs, weights, strict=True) if o.requires_grad]
    return list(
        torch.autograd.grad(
            [o for o, _ in pairs],
            list(inputs),
            [w for _, w in pairs],
            allow_unused=True,
            materialize_grads=True,
        )
    )


Result = tuple[Sequence[Tensor], Sequence[Tensor]]


def seeded(function: Callable[..., Sequence[Tensor]], arguments: Sequence[Tensor]) -> Result:
    """Outputs and gradients, with a seed of their own."""
    torch.manual_seed(11)
    outputs = function(*arguments)
    return outputs, gradients(outputs, [a for a in arguments if a.requires_grad])


def assert_same(actual: Result, expected: Result) -> None:
    """Equal but for the order in which float64 sums were added up."""
    for mine, theirs in zip(actual, expected, strict=True):
        assert len(mine) == len(theirs)
        for a, b in zip(mine, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def square(requires_grad: bool = True) -> Tensor:
    """A small matrix in float64."""
    return torch.randn(8, 8, dtype=torch.float64, requires_grad=requires_grad)
