"""Dropout and ReLU whose mask is made in their own pass, one bit an entry.

Saved for the backward: the bits, an eighth of a mask of bools, and nothing else. The backward of
both is ``memopt::apply_bits``. Packed as in `memopt.kernels.bits`.

The mask of a dropout depends on the seed and the entry alone: entry ``i`` takes word ``i % 4`` of
what Philox draws for the counter ``i // 4`` and the seed as its key. It is kept where the word,
read as a signed number, is at least ``p * 2**32 - 2**31``. So both implementations draw the same
mask, and so does a second run.

Pays: where a mask would be saved, or a ReLU's result for nothing but its sign. Does not: where
the backward may draw the mask again from its seed, which saves nothing and costs the generator's
work once more; nor for tensors that are not dense in the order of their indices, such as
channels-last ones, which the kernel reads from a copy.

Sources: a ReLU's mask of bits is Gist's: Jain et al. (2018), "Gist: efficient data encoding for
deep neural network training", doi:10.1109/ISCA.2018.00070. Dropout: Srivastava et al. (2014),
"Dropout: a simple way to prevent neural networks from overfitting", JMLR 15.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from memopt._torch import size_hint
from memopt.errors import ConfigError
from memopt.kernels.bits import APPLY_BITS, copied_for_bits, pack, unwritten_bits
from memopt.kernels.blocks import pieces
from memopt.kernels.inputs import within
from memopt.kernels.philox import random_words
from memopt.kernels.serving import launched, serves
from memopt.kernels.spec import Arguments, KernelSpec, Results, drawn
from memopt.kernels.wide import own_bytes, wide_bytes, wide_copy

# Entries whose random words exist at a time on the CPU; a multiple of four.
_DRAWN_AT_ONCE = 2**14
_DRAWING_BYTES = 22  # for each of them: a counter of eight bytes and its four words take 88

torch.library.define(
    "memopt::dropout_bits", "(Tensor x, Tensor seed, float p) -> (Tensor, Tensor)"
)
torch.library.define("memopt::relu_bits", "(Tensor x) -> (Tensor, Tensor)")
DROPOUT_BITS = torch.ops.memopt.dropout_bits.default
RELU_BITS = torch.ops.memopt.relu_bits.default


def factor_of(p: float) -> float:
    """What a dropout multiplies kept entries by; 0 where none is."""
    return 1.0 / (1.0 - p) if p < 1.0 else 0.0


def bound_of(p: float) -> int:
    """The least word, as a signed number of 32 bits, that keeps its entry; 2**31 keeps none."""
    return round(p * 2**32) - 2**31


def _dropout(x: Tensor, seed: Tensor, p: float) -> Results:
    """``x / (1 - p)`` where it is kept, 0 elsewhere, and the bits of what is kept.

    A dropped NaN or infinity becomes NaN, as eager's product with the mask makes it.

    Args:
        x: of any shape; float32 or wider, bfloat16 or float16.
        seed: one number, int64.
        p: probability that an entry is dropped.

    Returns:
        The shape and dtype of ``x``, contiguous; `(ceil(numel / 8),)`, uint8.

    Raises:
        ConfigError: the seed is not one int64, or ``p`` is no probability.
    """
    check_dropout(seed, p)
    kept = _kept(x, seed.view(()), bound_of(p))
    (packed,) = pack(kept)
    return wide_copy(x).mul_(kept).mul_(factor_of(p)).to(x.dtype), packed


def _kept(x: Tensor, seed: Tensor, bound: int) -> Tensor:
    """Which entries are, drawn a few at a time."""
    kept = torch.empty(x.shape, dtype=torch.bool, device=x.device)
    for piece in pieces(x.numel(), _DRAWN_AT_ONCE):
        kept.view(-1)[piece] = _drawn_words(piece, seed) >= bound
    return kept


def _drawn_words(piece: slice, seed: Tensor) -> Tensor:
    """Of some entries, as signed numbers; in int64, as the bound may be more than int32 holds."""
    counter = torch.arange(piece.start // 4, -(-piece.stop // 4), device=seed.device)
    words = random_words(counter, seed)[: piece.stop - piece.start]
    return words.to(torch.int32).long()


def _relu(x: Tensor) -> Results:
    """``max(x, 0)``, and the bits of where the gradient passes: where ``x`` is above 0, or NaN.

    Args:
        x: of any shape; float32 or wider, bfloat16 or float16.

    Returns:
        The shape and dtype of ``x``, contiguous; `(ceil(numel / 8),)`, uint8.
    """
    passes = (x <= 0).logical_not_()
    (packed,) = pack(passes)
    return torch.where(passes, x, 0.0).contiguous(), packed


def check_dropout(seed: Tensor, p: float) -> None:
    """Raise ``ConfigError`` for a seed that is not one int64, and what is no probability."""
    within("p", p, 0.0, 1.0)
    if seed.dtype != torch.int64 or seed.numel() != 1:
        raise ConfigError(
            f"the seed is {seed.dtype}, {tuple(seed.shape)}: allowed is one number, torch.int64"
        )


def unwritten(x: Tensor, *_: Any) -> Results:
    """Room for what either operator returns."""
    return x.new_empty(x.shape), unwritten_bits(x)


def _save_dropout(ctx: Any, inputs: Arguments, output: Results) -> None:
    _save(ctx, output, factor_of(inputs[2]))


def _save_relu(ctx: Any, inputs: Arguments, output: Results) -> None:
    _save(ctx, output, 1.0)


def _save(ctx: Any, output: Results, factor: float) -> None:
    _, bits = output
    ctx.mark_non_differentiable(bits)
    ctx.save_for_backward(bits)
    ctx.factor = factor


def _backward_dropout(ctx: Any, dy: Tensor, _: Any) -> tuple[Any, ...]:
    return APPLY_BITS(dy, *ctx.saved_tensors, ctx.factor), None, None


def _backward_relu(ctx: Any, dy: Tensor, _: Any) -> Tensor:
    return APPLY_BITS(dy, *ctx.saved_tensors, ctx.factor)  # type: ignore[no-any-return]


torch.library.register_fake("memopt::dropout_bits", unwritten)
torch.library.register_fake("memopt::relu_bits", unwritten)
torch.library.register_autograd(
    "memopt::dropout_bits", _backward_dropout, setup_context=_save_dropout
)
torch.library.register_autograd("memopt::relu_bits", _backward_relu, setup_context=_save_relu)


def _dropout_scratch(x: Tensor, seed: Tensor, p: float) -> int:
    if serves(x):
        return copied_for_bits(x)
    mask = size_hint(x.numel())
    drawing = min(mask, _DRAWN_AT_ONCE) * _DRAWING_BYTES
    product = 2 * wide_bytes(x)  # and the mask as factors
    return mask + max(drawing, product) - own_bytes(x)


def _relu_scratch(x: Tensor) -> int:
    return copied_for_bits(x) if serves(x) else size_hint(x.numel())


def _relu_samples(dtype: torch.dtype) -> Iterator[Arguments]:
    """Of a model's size, views whose rows are whole bytes of bits or not, and odd sizes."""
    yield (drawn(64, 1024, dtype=dtype),)
    yield (drawn(8, 16, 256, dtype=dtype),)
    yield (drawn(48, 3, 128, dtype=dtype)[:, 1],)
    yield (drawn(48, 2, 101, dtype=dtype)[:, 1],)
    yield (drawn(33, 333, dtype=dtype),)


def _dropout_samples(dtype: torch.dtype) -> Iterator[Arguments]:
    ps = (0.1, 0.5, 0.0, 0.9, 0.25)
    for number, ((x,), p) in enumerate(zip(_relu_samples(dtype), ps, strict=True)):
        yield x, torch.tensor((-1) ** number * 0x123456789ABCDEF * (number + 1)), p


DROPOUT_SPEC = KernelSpec(
    name="memopt::dropout_bits",
    plain=_dropout,
    launch=launched("triton_bits", "dropout"),
    scratch=_dropout_scratch,
    samples=_dropout_samples,
    source="JMLR 15 (2014), doi:10.1145/2063384.2063405, doi:10.1109/ISCA.2018.00070",
)
RELU_SPEC = KernelSpec(
    name="memopt::relu_bits",
    plain=_relu,
    launch=launched("triton_bits", "relu"),
    scratch=_relu_scratch,
    samples=_relu_samples,
    source="doi:10.1109/ISCA.2018.00070",
)
SPECS = (DROPOUT_SPEC, RELU_SPEC)
for _spec in SPECS:
    _spec.implement()
