"""Single operations of Triton on NumPy arrays, with the numbers of a device.

A block of bfloat16 is a float32 array of bfloat16 numbers, rounded to nearest even after every
operation; Triton's own interpreter keeps raw bits and computes with those.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime import interpreter as stock

from bench.triton.mode import MODE, Access, Array

_NO_BF16 = "the interpreter has no {} of bfloat16; cast to float32 first"


def nearest_bf16(x: Array) -> Array:
    """The bfloat16 number next to each float32, ties to even; as float32."""
    x = np.asarray(x, np.float32)
    bits = x.view(np.uint32)
    carry = np.uint32(0x7FFF) + ((bits >> 16) & np.uint32(1))
    nearest = (bits + carry) & np.uint32(0xFFFF0000)
    result: Array = np.where(np.isnan(x), np.float32(np.nan), nearest.view(np.float32))
    return result


def _nearest_tf32(x: Array) -> Array:
    """As ``cvt.rna.tf32``: ten bits of mantissa, ties away from zero."""
    bits: Array = np.ascontiguousarray(x).view(np.uint32)
    nearest: Array = (bits + np.uint32(0x1000)) & np.uint32(0xFFFFE000)
    return nearest.view(np.float32)


def rounded(handle: Any) -> Any:
    """The same handle; the numbers of a bfloat16 block rounded."""
    if handle.dtype.scalar == tl.bfloat16 and handle.data.dtype == np.float32:
        handle.data = nearest_bf16(handle.data)
    return handle


class Builder(stock.InterpreterBuilder):  # type: ignore[misc]
    """Triton's interpreter of single operations, repaired, with an observer."""

    def get_bf16(self, value: float) -> Any:
        return rounded(stock.TensorHandle(np.array([value], np.float32), tl.bfloat16))

    def binary_op(self, lhs: Any, rhs: Any, op: Callable[..., Any]) -> Any:
        return rounded(super().binary_op(lhs, rhs, op))

    def unary_op(self, arg: Any, op: Callable[..., Any]) -> Any:
        return rounded(super().unary_op(arg, op))

    def ternary_op(self, lhs: Any, rhs: Any, other: Any, op: Callable[..., Any]) -> Any:
        return rounded(super().ternary_op(lhs, rhs, other, op))

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
        return rounded(stock.TensorHandle(data, d.dtype.scalar))

    def cast_impl(self, src: Any, dst_type: Any) -> Any:
        data = src.data.astype(stock._get_np_dtype(dst_type))
        return rounded(stock.TensorHandle(data, dst_type.scalar))

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
        if (observer := MODE.get().observer) is not None:
            observer.barrier()

    def set_grid_dim(self, *sizes: int) -> None:
        super().set_grid_dim(*sizes)
        count, seed = int(np.prod(sizes)), MODE.get().order
        self.order = None if seed is None else np.random.default_rng(seed).permutation(count)

    def set_grid_idx(self, *index: int) -> None:
        number = int(np.ravel_multi_index(index, self.grid_dim))
        if self.order is not None:
            number = int(self.order[number])
        super().set_grid_idx(*(int(i) for i in np.unravel_index(number, self.grid_dim)))
        if (observer := MODE.get().observer) is not None:
            observer.program(number)

    def _access(self, kind: Access, ptrs: Any, mask: Any) -> None:
        if (observer := MODE.get().observer) is not None:
            active = ptrs.data[np.broadcast_to(mask.data, ptrs.data.shape)]
            itemsize = max(8, ptrs.get_element_ty().primitive_bitwidth) // 8
            observer.access(kind, active.reshape(-1), itemsize)
