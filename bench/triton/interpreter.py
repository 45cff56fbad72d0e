"""Triton kernels on CPU tensors: Triton's own interpreter, with its numbers repaired.

``install()`` makes ``kernel[grid](...)`` interpret where the tensors are on the CPU. Nothing else
changes: launches on a GPU and compilation are as ever, and no environment variable is read, so one
process can interpret a kernel and compile it.

What differs from ``TRITON_INTERPRET=1``:

1. A block of bfloat16 is a float32 array of bfloat16 numbers, rounded to nearest even after every
   operation. Triton's keeps raw bits and computes with those.
2. A float argument is a float32 scalar, as it is on a device, and not a Python float.
3. ``tl.dot`` of float32 rounds its operands to TF32 unless told otherwise.
4. An int32 that overflows and a failed ``tl.device_assert`` raise.
5. A masked lane that is given no value reads NaN: on a device it may hold anything.
6. Functions of libdevice in ``_LIBDEVICE`` work; of an autotuned kernel one configuration runs.
"""

import dataclasses
import functools
import types
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton import knobs
from triton.language.extra import libdevice
from triton.runtime import interpreter as stock
from triton.runtime.autotuner import Autotuner
from triton.runtime.jit import JITFunction

from bench.triton.builder import Builder, rounded
from bench.triton.mode import MODE, Array

_LIBDEVICE: Mapping[str, Callable[[Array], Array]] = {
    "exp": np.exp,
    "rint": np.rint,
    "rsqrt": lambda x: 1 / np.sqrt(x),
    "tanh": np.tanh,
}


def install() -> None:
    """Interpret launches on CPU tensors from now on; a second call does nothing.

    Raises:
        RuntimeError: ``TRITON_INTERPRET`` is set, so there is nothing left to compile.
    """
    if knobs.runtime.interpret:
        raise RuntimeError("unset TRITON_INTERPRET: it turns kernels into what cannot be compiled")
    if isinstance(stock.interpreter_builder, Builder):
        return
    stock.interpreter_builder.__class__ = Builder
    stock.interpreter_builder.options = dataclasses.replace(
        stock.interpreter_builder.options, debug=True, sanitize_overflow=True
    )
    for owner, name, wrap in (
        (stock, "_get_np_dtype", _wide_bf16),
        (stock, "_validate_np_data_size", _wide_bf16_fits),
        (stock, "_implicit_cvt", _float32_scalar),
        (stock, "_patch_lang", _patch_all),
        (stock.ReduceScanOpInterface, "to_tensor", _rounded_reduction),
        (JITFunction, "__call__", _device_function),
        (JITFunction, "run", _interpreted_launch),
        (Autotuner, "run", _one_config),
    ):
        original = getattr(owner, name)
        setattr(owner, name, functools.wraps(original)(wrap(original)))
    for name, function in _LIBDEVICE.items():  # in place: kernels import them by name
        stub = getattr(libdevice, name)
        stub.__code__ = _apply.__code__
        stub.__kwdefaults__ = {"function": function}


# What follows wraps one function of Triton each; ``install`` names which.


def _wide_bf16(original: Callable[..., Any]) -> Callable[..., Any]:
    """(1): float32 arrays for bfloat16."""
    return lambda kind: np.dtype(np.float32) if kind.scalar == tl.bfloat16 else original(kind)


def _wide_bf16_fits(original: Callable[..., Any]) -> Callable[..., Any]:
    """(1): and they are not too wide."""
    return lambda array, kind: kind == tl.bfloat16 or original(array, kind)


def _float32_scalar(original: Callable[..., Any]) -> Callable[..., Any]:
    """(2)."""

    def convert(argument: Any) -> Any:
        if not isinstance(argument, float):
            return original(argument)
        handle = stock.TensorHandle(np.array([argument], np.float32), tl.float32)
        return tl.tensor(handle, tl.float32)

    return convert


def _patch_all(original: Callable[..., Any]) -> Callable[..., Any]:
    """Give bodies to all of the language, also to what a kernel reaches through its functions."""
    seen = types.SimpleNamespace(__globals__={"tl": tl, "core": tl.core})

    def patch(kernel: Callable[..., Any]) -> Any:
        scope = original(seen)
        scope.set_attr(tl.tensor, "__index__", lambda self: int(self.handle.data.item()))
        return scope

    return patch


def _rounded_reduction(original: Callable[..., Any]) -> Callable[..., Any]:
    """(1): of the results of ``tl.sum`` and the like."""

    def to_tensor(self: Any, data: Any, kind: Any) -> Any:
        result = original(self, data, kind)
        rounded(result.handle)
        return result

    return to_tensor


def _device_function(original: Callable[..., Any]) -> Callable[..., Any]:
    """A call of one jitted function by another that is being interpreted."""

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not knobs.runtime.interpret:
            return original(self, *args, **kwargs)
        kwargs = {k: v for k, v in kwargs.items() if k not in ("_semantic", "_generator")}
        return _interpreted(self.fn).rewrite()(*args, **kwargs)

    return call


def _interpreted_launch(original: Callable[..., Any]) -> Callable[..., Any]:
    def run(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        if warmup or not _on_cpu((*args, *kwargs.values())):
            return original(self, *args, grid=grid, warmup=warmup, **kwargs)
        function, observer = _interpreted(self.fn), MODE.get().observer
        if observer is not None:
            named = dict(zip(function.arg_names, args, strict=False))
            observer.begin(self, {**named, **kwargs})
        with knobs.runtime.scope(), np.errstate(all="ignore"), warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # numpy's, about maxima of NaN
            knobs.runtime.interpret = True
            hooks = list(self.pre_run_hooks)
            body = function.rewrite()
            _InPlace(body, function.arg_names, grid, hooks)(*args, **kwargs)
        if observer is not None:
            observer.end()
        return None

    return run


class _InPlace(stock.GridExecutor):  # type: ignore[misc]
    """Tensors are on the CPU already; Triton's would copy every storage onto itself."""

    def _init_args_hst(self, args: Any, kwargs: Any) -> Any:
        return args, kwargs

    def _restore_args_dev(self, *arguments: Any) -> None:
        pass


def _one_config(original: Callable[..., Any]) -> Callable[..., Any]:
    """(6): nothing is timed; the mode says which configuration runs."""

    def run(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not _on_cpu((*args, *kwargs.values())):
            return original(self, *args, **kwargs)
        config = self.configs[MODE.get().config]
        if config.pre_hook is not None:
            named = dict(zip(self.arg_names, args, strict=False))
            config.pre_hook({**named, **kwargs, **config.all_kwargs()})
        return self.fn.run(*args, **kwargs, **config.all_kwargs())

    return run


@functools.cache
def _interpreted(function: Callable[..., Any]) -> Any:
    return stock.InterpretedFunction(function)


def _on_cpu(arguments: Sequence[Any]) -> bool:
    tensors = [a for a in arguments if isinstance(a, torch.Tensor)]
    return bool(tensors) and tensors[0].device.type == "cpu"


def _apply(arg0: Any, *, function: Callable[[Any], Any]) -> Any:
    """Body of a libdevice function; it may use no name but its own arguments'."""
    x = arg0.handle
    return type(arg0)(type(x)(function(x.data).astype(x.data.dtype), x.dtype), arg0.type)
