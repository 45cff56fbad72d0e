"""Reads the peak of a step off the code that will run.

Inductor reorders, fuses and reuses buffers after planning, so the plan's own estimate is not a
proof. The emitted module is: its ``call`` functions are executed here on fake tensors, with
every kernel replaced by nothing, and each storage is counted from its allocation to its release.
The forward's results feed the backward as they do at run time, in the same order.

Nothing is compiled, launched or allocated. Works on code from the compile cache as well.
"""

import ast
import logging
import sys
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from memopt._torch import FakeTensorMode, TorchDispatchMode, pytree
from memopt.timeline import LiveRange, Step, Timeline
from memopt.workspace import workspace_bytes

log = logging.getLogger(__name__)

_FILE = "<emitted by inductor>"


@dataclass(frozen=True)
class Certificate:
    """What the emitted code allocates.

    Attributes:
        peak_bytes: highest live bytes above what was resident when the step began.
        saved_bytes: bytes alive across the boundary that are no forward output.
        timeline: the emitted schedule, kernel by kernel.
    """

    peak_bytes: int
    saved_bytes: int
    timeline: Timeline


def certify(codes: Sequence[str], *, granularity: int = 1) -> Certificate | str:
    """Replay a forward, or a forward and its backward.

    Args:
        codes: source of the emitted modules, in the order of compilation.
        granularity: the allocator rounds each storage up to a multiple of this.

    Returns:
        The certificate, or the reason why the code cannot be replayed without running it: it
        reads a tensor's value, say, or is split into more than two modules.
    """
    if len(codes) not in (1, 2):
        return f"{len(codes)} emitted modules where 1 or 2 are expected"
    meter = _Meter(granularity)
    try:
        with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
            return _replay(codes, meter)
    except Exception as error:  # emitted code may use anything; an uncertified plan still runs
        log.debug("replay failed", exc_info=True)
        return f"the emitted code cannot be replayed: {type(error).__name__}: {error}"


def _replay(codes: Sequence[str], meter: "_Meter") -> Certificate:
    """Run the forward, then the backward on what it returned; outputs stay held throughout."""
    forward = _EmittedModule(codes[0], meter)
    results = list(forward.run(forward.arguments()))
    if len(codes) == 1:
        return meter.certificate(saved_bytes=0)
    backward = _EmittedModule(codes[1], meter)
    own = backward.arguments()
    tangents = [t for n, t in zip(backward.argument_names, own, strict=True) if "tangents" in n]
    received = len(own) - len(tangents)
    del own
    crossing = results[len(results) - received :]
    outputs = results[: len(results) - received]
    results.clear()
    held = {_key(t) for t in outputs if isinstance(t, torch.Tensor)}
    saved_bytes = sum(nbytes for key, nbytes in meter.live.items() if key not in held)
    meter.backward = True
    for tangent in tangents:
        meter.allocate(tangent, "tangent")
    arguments = [v for v in crossing if not isinstance(v, torch.Tensor)]
    arguments += [v for v in crossing if isinstance(v, torch.Tensor)]
    arguments += tangents
    tangent = None
    crossing.clear()
    tangents.clear()
    gradients = backward.run(arguments)
    certificate = meter.certificate(saved_bytes=saved_bytes)
    del gradients, outputs
    return certificate


@dataclass
class _Meter:
    """Counts storages as they come and go; every kernel call is one step."""

    granularity: int
    backward: bool = False
    peak: int = 0
    total: int = 0
    live: dict[int, int] = field(default_factory=dict)
    steps: list[Step] = field(default_factory=list)
    ranges: list[LiveRange] = field(default_factory=list)
    _born: dict[int, tuple[str, int]] = field(default_factory=dict)
    _resident: list[Any] = field(default_factory=list)

    def allocate(self, tensor: torch.Tensor, name: str) -> bool:
        """Count a tensor's storage until it dies; False where it is counted already."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._born:
            return False
        nbytes = -(-int(storage.nbytes()) // self.granularity) * self.granularity
        self.live[key] = nbytes
        self.total += nbytes
        self.peak = max(self.peak, self.total)
        self._born[key] = (name, len(self.steps))
        weakref.finalize(storage, self._release, key).atexit = False
        return True

    def step(self, name: str, scratch_bytes: int = 0) -> None:
        """Something ran, with that much scratch."""
        if scratch_bytes:
            self.peak = max(self.peak, self.total + scratch_bytes)
            self._range(f"workspace of {name}", scratch_bytes, len(self.steps), "workspace")
        self.steps.append(Step(name, backward=self.backward))

    def ignore(self, tensors: Sequence[Any]) -> None:
        """These were resident before the step began, and stay: their addresses are not reused."""
        self._resident.extend(tensors)
        for tensor in tensors:
            if isinstance(tensor, torch.Tensor):
                self._born.setdefault(_key(tensor), ("resident", -1))

    def certificate(self, saved_bytes: int) -> Certificate:
        """Close every open life and sum up."""
        for key in list(self.live):
            self._release(key)
        steps = tuple(self.steps) or (Step("nothing runs"),)
        ranges = tuple(r for r in self.ranges if r.first < len(steps))
        return Certificate(self.peak, saved_bytes, Timeline("plan", steps, ranges))

    def _release(self, key: int) -> None:
        nbytes = self.live.pop(key, None)
        name, first = self._born.pop(key, ("", -1))
        if nbytes is not None:
            self.total -= nbytes
            self._range(name, nbytes, first, "temporary")

    def _range(self, name: str, nbytes: int, first: int, role: str) -> None:
        last = first if role == "workspace" else max(first, len(self.steps) - 1)
        self.ranges.append(LiveRange(name=name, nbytes=nbytes, first=first, last=last, role=role))


class _Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts what operators allocate; an operator that allocates or writes is a step."""

    def __init__(self, module: "_EmittedModule", meter: _Meter) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._module, self._meter = module, meter

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = str(func).removesuffix(".default")
        empty = name.startswith("aten.empty")
        owner = self._module.target_of_running_line() if empty else name
        leaves = [t for t in pytree.tree_leaves(result) if isinstance(t, torch.Tensor)]
        fresh = [self._meter.allocate(t, owner or name) for t in leaves]
        if not empty and (any(fresh) or func._schema.is_mutable):
            self._meter.step(name, workspace_bytes(func, args, kwargs or {}, result))
        return result


class _EmittedModule:
    """One emitted module, executable with every compiled kernel a no-op."""

    def __init__(self, code: str, meter: _Meter) -> None:
        self._meter = meter
        tree = ast.parse(code)
        self._targets = {
            node.lineno: node.targets[0].id
            for node in ast.walk(tree)
            if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)
        }
        self.argument_names = _argument_names(tree)
        kernels = [n for s in tree.body if (n := _compiled_kernel(s)) is not None]
        tree.body = [s for s in tree.body if not _builds_kernels(s)]
        self._globals: dict[str, Any] = {"__name__": "emitted_by_inductor"}
        exec(compile(tree, _FILE, "exec"), self._globals)
        self._globals.update({name: _Kernel(name, meter) for name in kernels})
        self._globals.update(_STAND_INS)
        externs = self._globals.get("extern_kernels")
        self._globals["extern_kernels"] = _Externs(externs, meter)

    def arguments(self) -> list[Any]:
        """Fake arguments of the shapes that the module was compiled for."""
        return list(self._globals["get_args"]())

    def run(self, arguments: list[Any]) -> Sequence[Any]:
        """Execute ``call``; consumes ``arguments`` as the real one does."""
        if not self._meter.backward:
            self._meter.ignore(arguments)
        with _Watch(self, self._meter):
            result: Sequence[Any] = self._globals["call"](arguments)
        return result

    def target_of_running_line(self) -> str:
        """The variable that the emitted line now running assigns."""
        frame = sys._getframe(1)
        while frame is not None and frame.f_code.co_filename != _FILE:
            frame = frame.f_back  # type: ignore[assignment]
        return self._targets.get(frame.f_lineno, "") if frame is not None else ""


@dataclass(frozen=True)
class _Kernel:
    """Stands in for a compiled kernel; launchers are called as ``k(...)`` or ``k.run(...)``."""

    name: str
    meter: _Meter

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        self.meter.step(self.name)

    run = __call__

    def __getitem__(self, grid: Any) -> "_Kernel":
        return self


@dataclass(frozen=True)
class _Externs:
    """Stands in for ``extern_kernels``: what writes into ``out=`` allocates nothing."""

    real: Any
    meter: _Meter

    def __getattr__(self, name: str) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            if "out" in kwargs:
                self.meter.step(name)
                return kwargs["out"]
            return getattr(self.real, name)(*args, **kwargs)

        return call


def _nothing(*args: Any, **kwargs: Any) -> None:
    """Does nothing."""


def _empty_on(device: str) -> Callable[..., torch.Tensor]:
    return lambda size, stride, dtype: torch.empty_strided(
        size, stride, dtype=dtype, device=device
    )


def _reinterpret(
    tensor: torch.Tensor, size: Sequence[int], stride: Sequence[int], offset: int = 0
) -> torch.Tensor:
    return torch.as_strided(tensor, size, stride, tensor.storage_offset() + offset)


_STAND_INS: dict[str, Callable[..., Any]] = {
    "empty_strided_cpu": _empty_on("cpu"),
    "empty_strided_cpu_pinned": _empty_on("cpu"),
    "empty_strided_cuda": _empty_on("cuda"),
    "empty_strided_xpu": _empty_on("xpu"),
    "reinterpret_tensor": _reinterpret,
    "assert_size_stride": _nothing,
    "assert_alignment": _nothing,
    "get_raw_stream": _nothing,
}


def _key(tensor: torch.Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def _compiled_kernel(statement: ast.stmt) -> str | None:
    """The name that ``name = async_compile.something(...)`` binds."""
    if not isinstance(statement, ast.Assign) or not _builds_kernels(statement):
        return None
    target = statement.targets[0]
    return target.id if isinstance(target, ast.Name) else None


def _builds_kernels(statement: ast.stmt) -> bool:
    """Whether the statement belongs to the compilation of kernels."""
    if isinstance(statement, (ast.FunctionDef, ast.ClassDef, ast.Import, ast.ImportFrom)):
        return False
    return any(
        isinstance(node, ast.Name) and node.id == "async_compile" for node in ast.walk(statement)
    )


def _argument_names(tree: ast.Module) -> list[str]:
    """Names that ``get_args`` returns, in order."""
    for node in tree.body:
        if isinstance(node, ast.FunctionDef) and node.name == "get_args":
            returned = node.body[-1]
            if isinstance(returned, ast.Return) and isinstance(returned.value, ast.List):
                return [e.id for e in returned.value.elts if isinstance(e, ast.Name)]
    return []
