"""One gate for every kernel: what can be known of it on a machine without a GPU.

1. Numbers: no further from float64 than a reference in the same precision, with results that held
   NaN before.
2. Memory: nothing out of bounds, no races, the same bits whatever the order of its programs.
3. Traffic: no more bytes than the kernel declares.
4. Code: it compiles for every target, spills nothing, reads device memory 128 bits at a time, and
   uses the tensor cores where it should.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from bench.triton.ahead import TARGETS, Report, Target, compile_for
from bench.triton.mode import interpreting
from bench.triton.trace import Launch, trace
from memopt.kernels.spec import KernelSpec

# Sectors at the ends of rows, and values of a few bytes, are not in what a kernel declares.
_SLACK = 1.02
# Seeds. One is not enough: it may well leave the program that comes last where it is.
_ORDERS = (1, 2)


@dataclass(frozen=True, slots=True, kw_only=True)
class Traffic:
    """What a kernel declares to move, in bytes.

    Attributes:
        dram_bytes: to and from memory if the shared cache keeps everything.
        l2_bytes: to and from the shared cache, one instruction at a time.
        coalescing: least share of the sectors moved that is asked for.
    """

    dram_bytes: int
    l2_bytes: int
    coalescing: float = 0.95


@dataclass(frozen=True, slots=True, kw_only=True)
class Build:
    """How a kernel is compiled.

    Attributes:
        kernel: a jitted function, also under autotuning.
        arguments: as `bench.triton.ahead.compile_for` takes them.
        options: of the launch.
        matrix_products: whether it must use the tensor cores.
        vector_share: least share of its loads that has 128 bits or more.
    """

    kernel: Any
    arguments: Mapping[str, Any]
    options: Mapping[str, Any]
    matrix_products: bool = False
    vector_share: float = 0.5


Run = Callable[[], Sequence[Tensor]]


def check(
    run: Run,
    float64: Sequence[Tensor],
    low_precision: Sequence[Tensor],
    traffic: Traffic,
    build: Build | None = None,
    targets: Sequence[Target] = TARGETS,
) -> list[str]:
    """What is wrong with a kernel; an empty list lets it pass.

    Args:
        run: launches it, with results full of NaN before, and gives them back.
        float64: the exact results.
        low_precision: the reference's, computed in the kernel's precision.
        traffic: what it declares, summed over the launches of one run.
        build: how to compile it; None where another call does.
        targets: what to compile it for.
    """
    with trace() as launches:
        results = run()
    found = [*numbers(results, float64, low_precision), *memory(launches, traffic)]
    for seed in _ORDERS:
        with interpreting(order=seed):
            again = run()
        if not all(_same_bits(a, b) for a, b in zip(results, again, strict=True)):
            found.append(f"results depend on the order of programs: differ in order {seed}")
    if build is not None:
        found += code(build, targets)
    return found


def check_spec(spec: KernelSpec, arguments: Sequence[Any]) -> list[str]:
    """What is wrong with a kernel that states what it does, interpreted; empty lets it pass.

    Args:
        spec: the kernel.
        arguments: one of its samples.
    """
    plain = spec.plain(*arguments)
    exact = spec.plain(*in_float64(arguments))
    ideal = ideal_bytes(arguments, plain)
    traffic = Traffic(dram_bytes=int(ideal * spec.dram_share), l2_bytes=int(ideal * spec.l2_share))

    def run() -> Sequence[Tensor]:
        with uninitialised_is_nan():
            return spec.launch(*arguments)

    return check(run, exact, plain, traffic)


def compile_spec(
    spec: KernelSpec, arguments: Sequence[Any], targets: Sequence[Target]
) -> list[str]:
    """What is wrong with the code of a kernel: its launches are compiled as they are seen."""
    with trace() as launches:
        spec.launch(*arguments)
    found = []
    for launch in launches:
        for target in targets:
            seen = for_target(target, launch.arguments)
            build = Build(kernel=launch.kernel, arguments=seen, options={})
            found += [f"{launch.name}: {problem}" for problem in code(build, [target])]
    return found


def ideal_bytes(arguments: Sequence[Any], results: Sequence[Tensor]) -> int:
    """Bytes of a kernel that reads every argument once and writes every result once."""
    tensors = [t for t in (*pytree.tree_leaves(arguments), *results) if isinstance(t, Tensor)]
    return sum(t.nbytes for t in tensors)


@contextlib.contextmanager
def uninitialised_is_nan() -> Iterator[None]:
    """Within it, new tensors hold NaN, so that what a kernel leaves out is seen."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def in_float64(arguments: Sequence[Any]) -> Any:
    """The same arguments, with tensors of floating point, and dtypes of results, of float64."""

    def widened(leaf: Any) -> Any:
        if isinstance(leaf, torch.dtype):
            return torch.float64 if leaf.is_floating_point else leaf
        is_float = isinstance(leaf, Tensor) and leaf.is_floating_point()
        return leaf.double() if is_float else leaf

    return pytree.tree_map(widened, arguments)


def for_target(target: Target, arguments: Mapping[str, Any]) -> Mapping[str, Any]:
    """A launch's arguments on another device: AMD's wavefronts are two warps."""
    if not isinstance(target, str):
        return arguments
    return {**arguments, "num_warps": max(1, arguments["num_warps"] // 2)}


def numbers(
    results: Sequence[Tensor], float64: Sequence[Tensor], low_precision: Sequence[Tensor]
) -> list[str]:
    """Results further from float64 than the reference in low precision, or half a unit.

    Quantised values may be off as the reference's are; other whole numbers, and bools, must be its
    own.
    """
    found = []
    for index, (mine, exact, plain) in enumerate(
        zip(results, float64, low_precision, strict=True)
    ):
        if not (mine.is_floating_point() or mine.dtype == torch.int8):
            if not torch.equal(mine, plain):
                found.append(f"result {index} is not the reference's")
            continue
        eps = torch.finfo(mine.dtype).eps if mine.is_floating_point() else 0.0
        unit = eps / 2 * exact.double().norm().item()
        error = (mine.double() - exact).norm().item()
        allowed = (plain.double() - exact).norm().item() + unit
        if not error <= allowed:  # an error that is NaN must not pass
            found.append(f"result {index} is off by {error:.3e}, the reference by {allowed:.3e}")
    return found


def memory(launches: Sequence[Launch], traffic: Traffic) -> list[str]:
    """Conflicts, and more traffic than declared."""
    found = [f"{launch.name}: {conflict}" for launch in launches for conflict in launch.conflicts]
    for name, declared in (("dram", traffic.dram_bytes), ("l2", traffic.l2_bytes)):
        moved = sum(getattr(launch, f"{name}_bytes") for launch in launches)
        if moved > _SLACK * declared:
            found.append(f"moves {moved} bytes of {name}, and declares {declared}")
    found += [
        f"{launch.name}: asks for {launch.coalescing:.2f} of the sectors that it moves"
        for launch in launches
        if launch.coalescing < traffic.coalescing
    ]
    return found


def code(build: Build, targets: Sequence[Target] = TARGETS) -> list[str]:
    """What the compiler made of it that is not as it should be."""
    found = []
    for target in targets:
        report = compile_for(build.kernel, build.arguments, target, **build.options)
        found += [*report.problems(), *_instructions(report, build)]
    return found


def _instructions(report: Report, build: Build) -> list[str]:
    found = []
    if report.vector_loads < build.vector_share * report.loads:
        found.append(
            f"{report.target}: {report.vector_loads} of {report.loads} loads have 128 bits"
        )
    if build.matrix_products and not report.matrix_products:
        found.append(f"{report.target}: no use of the tensor cores")
    return found


def _same_bits(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.view(torch.uint8), b.view(torch.uint8))
