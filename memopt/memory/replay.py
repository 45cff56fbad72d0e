"""Executes a module that Inductor emitted, with every compiled kernel replaced by nothing.

It runs on fake tensors. A ``StorageMeter`` is told what the code allocates and which kernels it
calls.
"""

import ast
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import FrameType
from typing import Any

import torch

from memopt._torch import TorchDispatchMode, pytree
from memopt.memory.meter import StorageMeter
from memopt.memory.workspace import workspace_bytes

_FILE = "<emitted by inductor>"


class _Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts what operators allocate; an operator that allocates or writes is a step."""

    def __init__(self, module: "EmittedModule", meter: StorageMeter) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._module, self._meter = module, meter

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = str(func).removesuffix(".default")
        if name == "memopt.to_host":
            self._meter.ignore([result])
            return result
        empty = name.startswith("aten.empty")
        owner = self._module.target_of_running_line() if empty else name
        leaves = [t for t in pytree.tree_leaves(result) if isinstance(t, torch.Tensor)]
        fresh = [self._meter.allocate(t, owner or name) for t in leaves]
        if not empty and (any(fresh) or func._schema.is_mutable):
            self._meter.step(name, workspace_bytes(func, args, kwargs or {}, result))
        return result


class EmittedModule:
    """One emitted module, executable with every compiled kernel a no-op."""

    def __init__(self, code: str, meter: StorageMeter) -> None:
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
        frame: FrameType | None = sys._getframe(1)
        while frame is not None and frame.f_code.co_filename != _FILE:
            frame = frame.f_back
        return self._targets.get(frame.f_lineno, "") if frame is not None else ""


@dataclass(frozen=True)
class _Kernel:
    """Stands in for a compiled kernel; launchers are called as ``k(...)`` or ``k.run(...)``."""

    name: str
    meter: StorageMeter

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        self.meter.step(self.name)

    run = __call__

    def __getitem__(self, grid: Any) -> "_Kernel":
        return self


@dataclass(frozen=True)
class _Externs:
    """Stands in for ``extern_kernels``: what writes into ``out=`` allocates nothing."""

    real: Any
    meter: StorageMeter

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
