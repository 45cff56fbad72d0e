"""Rotary position embeddings of queries and keys, which are read once and written once.

Entries of a head are turned in pairs by an angle of the position and the pair: ``a`` and ``b``
become ``a * cos - b * sin`` and ``b * cos + a * sin``. A pair lies half of the rotated width
apart (GPT-NeoX, Llama) or side by side (GPT-J, Cohere, GLM). What is behind the rotated width
passes through. All in float32, rounded once.

Tables hold ``cos`` and ``sin`` of each position, so that rotations over several dimensions
(Qwen2-VL's sections, a picture's rows and columns) are tables like any other. ``R`` tells their
two forms apart, which a shape alone does not: ``W = R / 2`` has one entry for each pair, and
``W = R`` one for each entry of a head, in the order of the entries. The result is that of
``x * cos + rotate(x) * sin`` whatever a table of ``R`` holds, so nobody must prove that it holds
each angle twice; who can, passes a view of half of it, and half as much is read.

The inverse is the transposed map: the same with ``-sin``, and the gradient. Nothing is saved for
the backward but the tables, which get no gradient.

Pays: on a GPU, where one launch for queries and keys reads the tables once for all heads, and
where the rotated halves and their sums would be written between. Does not: on the CPU, whose
loops Inductor fuses as well.

Source: Su et al. (2021), "RoFormer: Enhanced Transformer with Rotary Position Embedding",
arXiv:2104.09864. One kernel for both in their own memory is Hsu et al. (2024), "Liger Kernel",
arXiv:2410.10989.

Legend: ``B`` batch, ``H`` heads, ``S`` positions, ``D`` entries of a head, ``R`` of them rotated,
``W`` width of the tables.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from memopt._torch import size_hint
from memopt.errors import ConfigError
from memopt.kernels.inputs import constant, same_dtype
from memopt.kernels.serving import serves
from memopt.kernels.spec import Arguments, KernelSpec, Results

_OPTIONS = "Tensor cos, Tensor sin, int rotary_dim, bool interleaved, bool inverse"
torch.library.define("memopt::rotary", f"(Tensor q, Tensor k, {_OPTIONS}) -> (Tensor, Tensor)")
torch.library.define("memopt::rotary_", f"(Tensor(a!) q, Tensor(b!) k, {_OPTIONS}) -> ()")
ROTARY = torch.ops.memopt.rotary.default
ROTARY_IN_PLACE = torch.ops.memopt.rotary_.default


def _plain(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    rotary_dim: int,
    interleaved: bool,
    inverse: bool,
) -> Results:
    """Queries and keys, rotated.

    Args:
        q: `(B, Hq, S, D)`, float; a layout of `(B, S, Hq, D)` is its transposed view.
        k: `(B, Hk, S, D)`, of the same dtype; `Hk` may be 0 where there are no keys to rotate.
        cos: `(1 or B, S, W)`, in any float dtype.
        sin: the same.
        rotary_dim: ``R``, even: ``W`` is ``R`` or ``R / 2``.
        interleaved: whether the entries of a pair lie side by side.
        inverse: whether to turn back.

    Returns:
        `(B, Hq, S, D)` and `(B, Hk, S, D)`, entries side by side, with the order of strides of
        ``q`` and ``k``, and their strides where those leave no gaps.

    Raises:
        ConfigError: shapes or dtypes are not these, or a table requires a gradient.
    """
    _check(q, k, cos, sin, rotary_dim)
    results = unwritten(q), unwritten(k)
    _turn((q, k), results, cos, sin, rotary_dim, interleaved, inverse)
    return results


def _turn(
    given: Results,
    results: Results,
    cos: Tensor,
    sin: Tensor,
    rotary_dim: int,
    interleaved: bool,
    inverse: bool,
) -> None:
    """Write what is given, rotated, into the results, which may be the same tensors."""
    wide = torch.promote_types(given[0].dtype, torch.float32)
    tables = []
    for table in (cos, sin):
        table = table[:, None].to(wide)
        whole = table.shape[-1] == rotary_dim
        tables.append(_pairs(table, interleaved) if whole else (table, table))
    (cos_a, cos_b), (sin_a, sin_b) = tables
    sign = 1
    if inverse:
        sin_a, sin_b, sign = sin_b, sin_a, -1
    for x, result in zip(given, results, strict=True):
        a, b = (t.to(wide) for t in _pairs(x[..., :rotary_dim], interleaved))
        new_a = (a * cos_a).addcmul_(b, sin_a, value=-sign)
        new_b = (b * cos_b).addcmul_(a, sin_b, value=sign)
        for half, new in zip(
            _pairs(result[..., :rotary_dim], interleaved), (new_a, new_b), strict=True
        ):
            half.copy_(new)
        if result is not x:
            result[..., rotary_dim:] = x[..., rotary_dim:]
        del a, b, half, new, new_a, new_b


def _pairs(x: Tensor, interleaved: bool) -> tuple[Tensor, Tensor]:
    """First and second entries of pairs along the last dimension."""
    if interleaved:
        return x[..., ::2], x[..., 1::2]
    half = x.shape[-1] // 2
    return x[..., :half], x[..., half:]


def unwritten(t: Tensor) -> Tensor:
    """Room for what queries or keys, fake or real, become: a transposed view stays one."""
    side_by_side = t.stride(-1) == 1
    order = torch.preserve_format if side_by_side else torch.contiguous_format
    return torch.empty_like(t, memory_format=order)


def _check(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, rotary_dim: int) -> None:
    fits = (
        q.dim() == k.dim() == 4
        and cos.dim() == sin.dim() == 3
        and q.shape[0] == k.shape[0]
        and q.shape[2:] == k.shape[2:]
        and rotary_dim % 2 == 0
        and 2 <= rotary_dim <= q.shape[3]
        and all(
            table.shape[0] in (1, q.shape[0])
            and table.shape[1] == q.shape[2]
            and table.shape[2] in (rotary_dim, rotary_dim // 2)
            for table in (cos, sin)
        )
        and cos.shape[2] == sin.shape[2]
    )
    if not fits:
        shapes = ", ".join(
            f"{name} is {tuple(t.shape)}"
            for name, t in {"q": q, "k": k, "cos": cos, "sin": sin}.items()
        )
        raise ConfigError(
            f"{shapes} and rotary_dim is {rotary_dim}: allowed are `(B, Hq, S, D)`, "
            "`(B, Hk, S, D)` and twice `(1 or B, S, W)` with an even rotary_dim up to D, of which "
            "W is all or half; transpose queries and keys that are `(B, S, H, D)`"
        )
    same_dtype("q", q, "k", k)


def _fake(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, rotary_dim: int, *_: bool) -> Results:
    _check(q, k, cos, sin, rotary_dim)
    return unwritten(q), unwritten(k)


def _save(ctx: Any, inputs: Arguments, output: Results) -> None:
    _, _, cos, sin, rotary_dim, interleaved, inverse = inputs
    for name, required in zip(("cos", "sin"), ctx.needs_input_grad[2:4], strict=True):
        if required:
            raise ConfigError(
                f"{name} requires a gradient, which is not computed: call {name}.detach()"
            )
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(cos, sin)
    ctx.options = rotary_dim, interleaved, not inverse


def _backward(ctx: Any, dq: Tensor | None, dk: Tensor | None) -> tuple[Tensor | None, ...]:
    given = dq if dk is None else dk
    if given is None:
        return (None,) * 7
    nothing = given[:, :0]
    of_q, of_k = ROTARY(
        nothing if dq is None else dq,
        nothing if dk is None else dk,
        *ctx.saved_tensors,
        *ctx.options,
    )
    return None if dq is None else of_q, None if dk is None else of_k, *(None,) * 5


torch.library.register_fake("memopt::rotary", _fake)
torch.library.register_autograd("memopt::rotary", _backward, setup_context=_save)


@torch.library.impl("memopt::rotary_", "default")
def _in_place(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *options: Any) -> None:
    """The same, over the queries and keys: entries that pass through are not touched.

    It has no autograd, and is for a graph whose liveness is known: a pass behind
    functionalisation puts it where nothing reads the old values any more. Traced itself, it is a
    mutation like any other, which functionalisation wraps and undoes where it can.

    Args:
        q: as ``rotary`` takes it; no two of its elements in one place.
        k: the same, sharing no element with ``q``.
        cos: as ``rotary`` takes it.
        sin: the same.
        *options: the same.

    Raises:
        ConfigError: what ``rotary`` refuses; elements that share a place or are apart from one
            another; queries or keys require a gradient.
    """
    _check(q, k, cos, sin, options[0])
    for name, t in {"q": q, "k": k, "cos": cos, "sin": sin}.items():
        constant(name, t)
    for name, t in (("q", q), ("k", k)):
        if not fits_in_place(t):
            raise ConfigError(
                f"{name} has strides {t.stride()} for {tuple(t.shape)}: allowed in place are "
                "heads whose entries lie side by side, no two in one place; use rotary"
            )
    if serves(q):
        from memopt.kernels import triton_rotary  # here, because Triton is optional

        triton_rotary.rotate(q, k, cos, sin, *options, results=(q, k))
    else:
        _turn((q, k), (q, k), cos, sin, *options)


def _fake_in_place(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, rotary_dim: int, *_: bool
) -> None:
    _check(q, k, cos, sin, rotary_dim)


torch.library.register_fake("memopt::rotary_", _fake_in_place)


def fits_in_place(t: Tensor) -> bool:
    """Whether queries or keys, fake or real, can be rotated in their own memory."""
    steps = sorted(
        (size_hint(stride), size_hint(size))
        for size, stride in zip(t.shape, t.stride(), strict=True)
        if size_hint(size) > 1
    )
    reach = 0
    for stride, size in steps:
        if stride <= reach:
            return False
        reach += stride * (size - 1)
    return size_hint(t.stride(-1)) == 1


def scratch_bytes(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, rotary_dim: int, *_: bool
) -> int:
    """What ``rotary`` and ``rotary_`` allocate besides their results, in bytes, at most."""
    if serves(q):
        return sum(_bytes(t) for t in (q, k, cos, sin) if t.stride(-1) != 1)
    wide = torch.promote_types(q.dtype, torch.float32)
    tables = sum(_bytes(t, wide) for t in (cos, sin) if t.dtype != wide)
    of_heads = max(_bytes(t, wide) for t in (q, k)) * rotary_dim // size_hint(q.shape[3])
    return tables + of_heads * (1 if q.dtype == wide else 2)


def _bytes(t: Tensor, dtype: torch.dtype | None = None) -> int:
    return size_hint(t.numel()) * (dtype or t.dtype).itemsize


def _launch(q: Tensor, k: Tensor, *options: Any) -> Results:
    from memopt.kernels import triton_rotary

    _check(q, k, *options[:3])
    return triton_rotary.rotate(q, k, *options, results=(unwritten(q), unwritten(k)))


def _samples(dtype: torch.dtype) -> Iterator[Arguments]:
    """Llama's, Cohere's and GPT-NeoX's; then odd sizes, other layouts, and the way back."""

    def heads(batch: int, count: int, positions: int, size: int) -> Tensor:
        return torch.randn(batch, positions, count, size).to(dtype).transpose(1, 2)

    def tables(batch: int, positions: int, width: int, kind: torch.dtype) -> list[Tensor]:
        angles = torch.rand(batch, positions, width) * 6.3
        return [angles.cos().to(kind), angles.sin().to(kind)]

    def twice(batch: int, positions: int, width: int, kind: torch.dtype) -> list[Tensor]:
        return [torch.cat([t, t], -1) for t in tables(batch, positions, width // 2, kind)]

    shared = [t[..., :64] for t in twice(1, 64, 128, dtype)]
    yield heads(2, 8, 64, 128), heads(2, 2, 64, 128), *shared, 128, False, False
    each = [t.repeat_interleave(2, -1) for t in tables(2, 32, 64, torch.float32)]
    yield heads(2, 8, 32, 128), heads(2, 4, 32, 128), *each, 128, True, False
    partial = twice(2, 64, 32, torch.float32)
    yield heads(2, 4, 64, 128), heads(2, 4, 64, 128), *partial, 32, False, False
    by_head = [torch.randn(2, count, 33, 96).to(dtype) for count in (3, 1)]
    yield *by_head, *tables(2, 33, 96, dtype), 96, False, True
    packed = heads(1, 12, 40, 64)
    yield packed[:, :8], packed[:, 8:10], *tables(1, 40, 32, torch.bfloat16), 64, False, True
    yield heads(3, 5, 9, 128), heads(3, 5, 9, 128), *tables(3, 9, 32, dtype), 64, True, True


SPEC = KernelSpec(
    name="memopt::rotary",
    plain=_plain,
    launch=_launch,
    scratch=scratch_bytes,
    samples=_samples,
    l2_share=1.1,  # a table that a batch shares is read once for each of its rows
    source="arXiv:2104.09864, arXiv:2410.10989",
)
SPECS = (SPEC,)
SPEC.implement()
