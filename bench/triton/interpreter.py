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

import contextlib
import dataclasses
import functools
import types
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
import torch
import triton.language as tl
from numpy.typing import NDArray
from triton import knobs
from triton.language.extra import libdevice
from triton.runtime import interpreter as stock
from triton.runtime.autotuner import Autotuner
from triton.runtime.jit import JITFunction

Array = NDArray[Any]
Access = Literal["load", "store", "atomic"]

_LIBDEVICE: Mapping[str, Callable[[Array], Array]] = {"tanh": np.tanh}
_NO_BF16 = "the interpreter has no {} of bfloat16; cast to float32 first"


class Observer(Protocol):
    """What is told about a launch while it runs."""

    def begin(self, kernel: str, arguments: Mapping[str, Any]) -> None:
        """A launch with these arguments starts."""

    def program(self, index: int) -> None:
        """The program of this number, counted from 0 in the order of the grid, starts."""

    def access(self, kind: Access, addresses: Array, itemsize: int) -> None:
        """One instruction of the program touches these addresses, masked lanes left out."""

    def barrier(self) -> None:
        """The threads of the program wait for one another."""

    def end(self) -> None:
        """The launch is over; not called where it raises."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Mode:
    """How kernels are interpreted.

    Attributes:
        config: which configuration of an autotuned kernel runs, by its number.
        order: seed of the order of a launch's programs; None for that of the grid.
        observer: told about every launch.
    """

    config: int = 0
    order: int | None = None
    observer: Observer | None = None


_MODE: ContextVar[Mode] = ContextVar("mode", default=Mode())  # noqa: B039 - it is frozen


@contextlib.contextmanager
def interpreting(**changes: Any) -> Iterator[None]:
    """Within it, launches run in the current mode with these fields of `Mode` changed."""
    token = _MODE.set(dataclasses.replace(_MODE.get(), **changes))
    try:
        yield
    finally:
        _MODE.reset(token)


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


def nearest_bf16(x: Array) -> Array:
    """The bfloat16 number next to each float32, ties to even; as float32."""
    x = np.asarray(x, np.float32)
    bits = x.view(np.uint32)
    carry = np.uint32(0x7FFF) + ((bits >> 16) & np.uint32(1))
    rounded = (bits + carry) & np.uint32(0xFFFF0000)
    result: Array = np.where(np.isnan(x), np.float32(np.nan), rounded.view(np.float32))
    return result


def _nearest_tf32(x: Array) -> Array:
    """As ``cvt.rna.tf32``: ten bits of mantissa, ties away from zero."""
    bits: Array = np.ascontiguousarray(x).view(np.uint32)
    rounded: Array = (bits + np.uint32(0x1000)) & np.uint32(0xFFFFE000)
    return rounded.view(np.float32)


def _rounded(handle: Any) -> Any:
    """The same handle; the numbers of a bfloat16 block rounded."""
    if handle.dtype.scalar == tl.bfloat16 and handle.data.dtype == np.float32:
        handle.data = nearest_bf16(handle.data)
    return handle


class Builder(stock.InterpreterBuilder):  # type: ignore[misc]
    """Triton's interpreter of single operations, with (1), (3), (5) and an observer."""

    def get_bf16(self, value: float) -> Any:
        return _rounded(stock.TensorHandle(np.array([value], np.float32), tl.bfloat16))

    def binary_op(self, lhs: Any, rhs: Any, op: Callable[..., Any]) -> Any:
        return _rounded(super().binary_op(lhs, rhs, op))

    def unary_op(self, arg: Any, op: Callable[..., Any]) -> Any:
        return _rounded(super().unary_op(arg, op))

    def ternary_op(self, lhs: Any, rhs: Any, other: Any, op: Callable[..., Any]) -> Any:
        return _rounded(super().ternary_op(lhs, rhs, other, op))

    def create_fabs(self, arg: Any) -> Any:
        return self.unary_op(arg, np.abs)

    def create_fma(self, x: Any, y: Any, z: Any) -> Any:
        def once(a: Array, b: Array, c: Array) -> Array:
            return (a.astype(np.float64) * b + c).astype(c.dtype)

        return self.ternary_op(x, y, z, once)

    def create_dot(self, a: Any, b: Any, d: Any, input_precision: Any, imprecise: Any) -> Any:
        kind = a.dtype.scalar
        if kind not in (tl.float32, tl.bfloat16, tl.float16):
            return super().create_dot(a, b, d, input_precision, imprecise)
        x, y = (h.data.astype(np.float32, copy=False) for h in (a, b))
        if kind == tl.float32 and input_precision == stock._ir.INPUT_PRECISION.TF32:
            x, y = _nearest_tf32(x), _nearest_tf32(y)
        data = (np.matmul(x, y) + d.data).astype(d.data.dtype, copy=False)
        return _rounded(stock.TensorHandle(data, d.dtype.scalar))

    def cast_impl(self, src: Any, dst_type: Any) -> Any:
        data = src.data.astype(stock._get_np_dtype(dst_type))
        return _rounded(stock.TensorHandle(data, dst_type.scalar))

    def create_fp_to_fp(self, src: Any, dst_type: Any, rounding_mode: Any) -> Any:
        if tl.bfloat16 in (src.dtype.scalar, dst_type.scalar):
            raise NotImplementedError(_NO_BF16.format("rounding mode"))
        return super().create_fp_to_fp(src, dst_type, rounding_mode)

    def create_bitcast(self, src: Any, dst_type: Any) -> Any:
        if tl.bfloat16 in (src.dtype.scalar, dst_type.scalar):
            raise NotImplementedError(_NO_BF16.format("bitcast"))
        return super().create_bitcast(src, dst_type)

    def create_masked_load(self, ptrs: Any, mask: Any, other: Any, *hints: Any) -> Any:
        self._access("load", ptrs, mask)
        kind = ptrs.get_element_ty()
        if other is None and kind.is_floating() and kind.primitive_bitwidth > 8:
            unknown = np.full(ptrs.data.shape, np.nan, stock._get_np_dtype(kind))
            other = stock.TensorHandle(unknown, kind)
        if kind != tl.bfloat16:
            return super().create_masked_load(ptrs, mask, other, *hints)
        high = (np.ascontiguousarray(other.data).view(np.uint32) >> 16).astype(np.uint16)
        bits = stock._interpreter.load(ptrs.data, mask.data, high, np.dtype(np.uint16))
        data = (bits.astype(np.uint32) << 16).view(np.float32)
        return stock.TensorHandle(data, kind)

    def create_masked_store(self, ptrs: Any, value: Any, mask: Any, *hints: Any) -> Any:
        self._access("store", ptrs, mask)
        if ptrs.get_element_ty() == tl.bfloat16:
            bits = np.ascontiguousarray(value.data).view(np.uint32) >> 16
            value = stock.TensorHandle(bits.astype(np.uint16), tl.uint16)
        return super().create_masked_store(ptrs, value, mask, *hints)

    def create_atomic_rmw(
        self, op: Any, ptr: Any, val: Any, mask: Any, sem: Any, scope: Any
    ) -> Any:
        if val.dtype.scalar == tl.bfloat16:
            raise NotImplementedError(_NO_BF16.format("atomic"))
        self._access("atomic", ptr, mask)
        return super().create_atomic_rmw(op, ptr, val, mask, sem, scope)

    def create_atomic_cas(self, ptr: Any, cmp: Any, val: Any, sem: Any, scope: Any) -> Any:
        everywhere = stock.TensorHandle(np.ones_like(ptr.data, dtype=bool), tl.int1)
        self._access("atomic", ptr, everywhere)
        return super().create_atomic_cas(ptr, cmp, val, sem, scope)

    def create_barrier(self) -> None:
        if (observer := _MODE.get().observer) is not None:
            observer.barrier()

    def set_grid_dim(self, *sizes: int) -> None:
        super().set_grid_dim(*sizes)
        count, seed = int(np.prod(sizes)), _MODE.get().order
        self.order = None if seed is None else np.random.default_rng(seed).permutation(count)

    def set_grid_idx(self, *index: int) -> None:
        number = int(np.ravel_multi_index(index, self.grid_dim))
        if self.order is not None:
            number = int(self.order[number])
        super().set_grid_idx(*(int(i) for i in np.unravel_index(number, self.grid_dim)))
        if (observer := _MODE.get().observer) is not None:
            observer.program(number)

    def _access(self, kind: Access, ptrs: Any, mask: Any) -> None:
        if (observer := _MODE.get().observer) is not None:
            active = ptrs.data[np.broadcast_to(mask.data, ptrs.data.shape)]
            itemsize = max(8, ptrs.get_element_ty().primitive_bitwidth) // 8
            observer.access(kind, active.reshape(-1), itemsize)


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
        _rounded(result.handle)
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
        function, observer = _interpreted(self.fn), _MODE.get().observer
        if observer is not None:
            named = dict(zip(function.arg_names, args, strict=False))
            observer.begin(self.fn.__name__, {**named, **kwargs})
        with knobs.runtime.scope(), np.errstate(all="ignore"), warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # numpy's, about maxima of NaN
            knobs.runtime.interpret = True
            hooks = list(self.pre_run_hooks)
            body = function.rewrite()
            stock.GridExecutor(body, function.arg_names, grid, hooks)(*args, **kwargs)
        if observer is not None:
            observer.end()
        return None

    return run


def _one_config(original: Callable[..., Any]) -> Callable[..., Any]:
    """(6): nothing is timed; the mode says which configuration runs."""

    def run(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not _on_cpu((*args, *kwargs.values())):
            return original(self, *args, **kwargs)
        config = self.configs[_MODE.get().config]
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
