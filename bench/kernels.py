"""Kernels by themselves: what they move, what they compile to, and on a GPU how fast they are.

Bytes are counted by the tracer of `bench.triton` and code is read from binaries for GPUs that are
not there, on any machine. Every operator is measured on its usual arguments in bfloat16.
"""

import importlib.util
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from bench.libraries import LIBRARIES
from bench.liger_fused import FUSED, Composition
from bench.liger_kernels import LIGER
from memopt.kernels import specs
from memopt.kernels.spec import Arguments, KernelSpec

CASE = "kernels"
DTYPE = torch.bfloat16
# The first samples of a kernel are the usual ones.
_SAMPLES = 3
_REPORTED = (
    "registers", "spilled_bytes", "shared_bytes", "shared_limit_bytes",
    "loads", "vector_loads", "stores", "vector_stores", "matrix_products",
)  # fmt: skip

Row = dict[str, Any]
Say = Callable[[str], None]


def run(
    device: str, say: Say, *, kernels: Sequence[KernelSpec] | None = None, samples: int = _SAMPLES
) -> list[Row]:
    """Rows of kinds ``kernel_traffic`` and ``kernel_code``, on a GPU also ``kernel_speed``.

    Args:
        device: ``"cpu"`` or ``"cuda"``; bytes and code are the same for both.
        say: called with one line per row.
        kernels: which ones; all by default.
        samples: how many of each kernel's; of the others, the bytes of the first that liger does
            in a way of its own.
    """
    if importlib.util.find_spec("triton") is None:
        why = {"status": "skipped", "error": "triton is not installed"}
        say(f"{CASE}: {why['error']}")
        return [{"kind": "kernel_traffic", "case": CASE, "peer": "memopt", **why}]
    from bench.triton.interpreter import install

    install()
    torch.manual_seed(0)
    rows = []
    for row in _rows(device, specs() if kernels is None else kernels, samples):
        say(one_line(row))
        rows.append(row)
    return rows


def _rows(device: str, kernels: Sequence[KernelSpec], samples: int) -> Iterator[Row]:
    for spec in kernels:
        seen = set()
        for number, arguments in enumerate(variants(spec, DTYPE)):
            liger = liger_peer(spec, arguments, "cpu")
            new = isinstance(liger, Composition) and liger.words not in seen
            if number < samples or new:
                yield from _traffic(spec, arguments, liger)
            if isinstance(liger, Composition):
                seen.add(liger.words)
            if number < samples:
                yield from _code(spec, arguments)
        if device == "cuda":
            for arguments in itertools.islice((spec.large or spec.samples)(DTYPE), samples):
                yield from _speed(spec, arguments)


def one_line(row: Row) -> str:
    """A row in words, for the one who waits."""
    about = f"{row['kernel']} of {row['sample']}: {row.get('form') or row['peer']}"
    if row["status"] != "ok":
        return f"{about} {row['status']}: {row['error']}"
    if row["kind"] == "kernel_code":
        return f"{about}, {row['function']} for {row['target']}: {row['registers']} registers"
    if row["kind"] == "kernel_speed":
        return f"{about}: {1e6 * row['seconds']:.1f} us"
    return f"{about}: {row['dram_bytes'] / row['ideal_bytes']:.3f} of the bytes that it must move"


def describe(spec: KernelSpec, arguments: Arguments) -> str:
    """The arguments by name: shapes of tensors, and other values that are not 0 or None."""
    words = []
    for name, value in zip(_names(spec), arguments, strict=True):
        if isinstance(value, Tensor):
            if value.numel():
                words.append(f"{name} {'x'.join(map(str, value.shape))}")
        elif value:
            words.append(name if value is True else f"{name} {value}")
    return ", ".join(words)


def _names(spec: KernelSpec) -> list[str]:
    return [argument.name for argument in spec.operator._schema.arguments]


def variants(spec: KernelSpec, dtype: torch.dtype) -> Iterator[Arguments]:
    """The samples; then the usual ones of a backward with the result made again, or without."""
    samples = [*spec.samples(dtype)]
    yield from samples
    if _names(spec)[-1] == "again":
        yield from ((*others, not again) for *others, again in samples[:_SAMPLES])


def _row(kind: str, spec: KernelSpec, arguments: Arguments, peer: str, **figures: Any) -> Row:
    about = {"kernel": spec.name, "sample": describe(spec, arguments), "dtype": str(DTYPE)[6:]}
    return {"kind": kind, "case": CASE, "peer": peer, **about, "status": "ok", "error": ""} | (
        figures
    )


def liger_peer(spec: KernelSpec, arguments: Arguments, device: str) -> Composition | str:
    """What does the same with liger's kernels, without words if it is one; or why nothing does."""
    alone, fused = LIGER.get(spec.name), FUSED.get(spec.name)
    if alone is None and fused is None:
        return "liger-kernel has none"
    if (reason := LIBRARIES["liger"].unavailable(device)) is not None:
        return reason
    if alone is not None and (run := alone(*arguments)) is not None:
        return Composition(words="", run=run)
    several = None if fused is None else fused(*arguments)
    return several or "liger-kernel has no such form"


def moved_bytes(run: Callable[[], Any]) -> dict[str, int]:
    """To and from memory and the shared cache, by launches and torch's operators beside them."""
    from bench.triton.operators import operators
    from bench.triton.trace import trace

    with trace() as launches, operators() as beside:
        run()
    return {
        name: beside.moved_bytes + sum(getattr(launch, name) for launch in launches)
        for name in ("dram_bytes", "l2_bytes")
    }


def _traffic(spec: KernelSpec, arguments: Arguments, liger: Composition | str) -> Iterator[Row]:
    """Bytes of ours and of liger's."""
    from bench.triton.gate import ideal_bytes

    ideal = ideal_bytes(arguments, spec.plain(*arguments))
    ours = moved_bytes(lambda: spec.launch(*arguments))
    yield _row("kernel_traffic", spec, arguments, "memopt", ideal_bytes=ideal, **ours)
    if isinstance(liger, str):
        figures: Row = {"status": "skipped", "error": liger}
    else:
        figures = {"form": liger.words, **moved_bytes(liger.run)}
    yield _row("kernel_traffic", spec, arguments, "liger", ideal_bytes=ideal, **figures)


def _code(spec: KernelSpec, arguments: Arguments) -> Iterator[Row]:
    """What our launches become for each target."""
    from bench.triton.ahead import TARGETS, compile_for
    from bench.triton.gate import for_target
    from bench.triton.trace import trace

    with trace() as launches:
        spec.launch(*arguments)
    for launch, target in itertools.product(launches, TARGETS):
        about = {"function": launch.name, "target": str(target)}
        try:
            report = compile_for(launch.kernel, for_target(target, launch.arguments), target)
            figures = {name: getattr(report, name) for name in _REPORTED}
        except Exception as error:  # what a compiler cannot do belongs in the results
            figures = {"status": "failed", "error": f"{type(error).__name__}: {error}"}
        yield _row("kernel_code", spec, arguments, "memopt", **about, **figures)


def _speed(spec: KernelSpec, arguments: Arguments) -> Iterator[Row]:
    """Seconds on this machine's GPU, the median of many runs with a cold cache each."""
    from triton.testing import do_bench

    arguments = pytree.tree_map_only(Tensor, lambda t: t.cuda(), arguments)
    torch.compiler.reset()  # it gives up on a function that has met many shapes
    compiled = torch.compile(spec.plain, dynamic=False)
    peers: dict[str, Callable[[], Any]] = {
        "memopt": lambda: spec.launch(*arguments),
        "eager": lambda: spec.plain(*arguments),
        "inductor": lambda: compiled(*arguments),
    }
    liger = liger_peer(spec, arguments, "cuda")
    if isinstance(liger, str):
        yield _row("kernel_speed", spec, arguments, "liger", status="skipped", error=liger)
    else:
        peers["liger"] = liger.run
    for peer, launch in peers.items():
        figures: Row = {"seconds": do_bench(launch, return_mode="median") / 1000}
        if peer == "liger" and isinstance(liger, Composition):
            figures["form"] = liger.words
        yield _row("kernel_speed", spec, arguments, peer, **figures)
