"""The kernels of liger-kernel that do what ours do, by the name of our operator.

Each entry takes the arguments of the operator and gives what runs liger's kernel on them, or None
where liger has no such form. What its autograd would do besides is left out. What takes liger more
than one launch is in `bench.liger_fused`.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from memopt.kernels import norm

Run = Callable[[], Any]
Peer = Callable[..., Run | None]


def _casting(offset: float) -> str:
    """Gemma's norm has an offset and computes in float32, Llama's has none."""
    return "gemma" if offset else "llama"


def _norm(*args: Any) -> Run | None:
    from liger_kernel.ops import fused_add_rms_norm, layer_norm, rms_norm

    x, residual, weight, bias, eps, offset, centred = norm.Arguments(*args)
    if centred:
        if residual is not None or weight is None or bias is None or offset:
            return None
        return lambda: layer_norm.layer_norm_forward(x, weight, bias, eps)
    if bias is not None:
        return None
    casting = _casting(offset)
    if residual is None:
        return lambda: rms_norm.rms_norm_forward(x, weight, eps, offset, casting, None)
    if weight is None:
        return None
    forward = fused_add_rms_norm.fused_add_rms_norm_forward
    return lambda: forward(x, residual, weight, eps, offset, casting)


def _norm_backward(*args: Any) -> Run | None:
    from liger_kernel.ops import fused_add_rms_norm, layer_norm, rms_norm

    a = norm.BackwardArguments(*args)
    dy, dtotal, total, weight, bias, mean, rstd, offset, wanted, again = a
    if again:
        return None
    rows = (dy.reshape(-1, dy.shape[-1]), total.reshape(-1, total.shape[-1]))
    mean, rstd = mean.flatten(), rstd.flatten()
    if mean.numel():
        if dtotal is not None or weight is None or bias is None or offset:
            return None
        return lambda: layer_norm.layer_norm_backward(*rows, weight, bias, mean, rstd, *wanted)
    if bias is not None:
        return None
    casting = _casting(offset)
    # Each takes what its forward chose: the block, the warps, and how it casts.
    if dtotal is None:
        forward = rms_norm.rms_norm_forward
        *_, block, warps, mode = forward(rows[1], weight, 1e-6, offset, casting, None)
        dy = rows[0].clone()  # its gradient takes this one's place, as in liger's default
        launch = (offset, mode, block, warps, True, None, wanted[0])
        return lambda: rms_norm.rms_norm_backward(dy, rows[1], weight, rstd, *launch)
    if weight is None:
        return None
    start = fused_add_rms_norm.fused_add_rms_norm_forward
    backward = fused_add_rms_norm.fused_add_rms_norm_backward
    *_, block, warps, stages, mode = start(rows[1], rows[1], weight, 1e-6, offset, casting)
    settings = (offset, mode, block, warps, stages, False, wanted[0])
    return lambda: backward(rows[0], dtotal, rows[1], weight, rstd, *settings)


def activations(name: str) -> tuple[Callable[..., Any], Callable[..., Any]] | None:
    """Forward and backward of the gated activation of this name.

    The backward writes the gradients over gate and up.
    """
    from liger_kernel.ops import geglu, swiglu

    return {
        "silu": (swiglu.swiglu_forward, swiglu.swiglu_backward),
        "gelu_tanh": (geglu.geglu_forward, geglu.geglu_backward),
    }.get(name)


def _dense(*tensors: Tensor) -> bool:
    return all(t.is_contiguous() and t.numel() for t in tensors)


def _gated(gate: Tensor, up: Tensor, activation: str) -> Run | None:
    kernels = activations(activation)
    if kernels is None or not _dense(gate, up):
        return None
    return lambda: kernels[0](gate, up)[2:]


def _gated_backward(
    dy: Tensor, gate: Tensor, up: Tensor, activation: str, again: bool
) -> Run | None:
    kernels = activations(activation)
    if kernels is None or again or not _dense(dy, gate, up):
        return None
    copies = gate.clone(), up.clone()
    return lambda: kernels[1](*copies, dy)


def _gated_packed(x: Tensor, activation: str, gate_last: bool) -> Run | None:
    from liger_kernel.ops.swiglu import swiglu_fused_gate_up_forward

    if activation != "silu" or gate_last or not _dense(x):
        return None
    return lambda: swiglu_fused_gate_up_forward(x)[1:]


def _gated_packed_backward(
    dy: Tensor, x: Tensor, activation: str, gate_last: bool, again: bool
) -> Run | None:
    from liger_kernel.ops.swiglu import swiglu_fused_gate_up_backward

    if activation != "silu" or gate_last or again or not _dense(dy, x):
        return None
    return lambda: (swiglu_fused_gate_up_backward(x, dy),)


def liger_tables(
    q: Tensor, cos: Tensor, sin: Tensor, rotary_dim: int, interleaved: bool
) -> list[Tensor] | None:
    """Tables as liger reads them, each angle twice, half a head apart.

    Of these it reads the first half, which stands for the second one as well. None where they hold
    more, and where they are narrower than the heads: it computes in their precision.
    """
    halves = []
    for table in (cos, sin):
        if torch.promote_types(q.dtype, table.dtype) != table.dtype:
            return None
        first = second = table
        if table.shape[-1] == rotary_dim:
            first, second = table[..., ::2], table[..., 1::2]
            if not interleaved:
                first, second = table.chunk(2, -1)
        if not torch.equal(first, second):
            return None
        halves.append(torch.cat([first, first], -1))
    return halves


def _rotary(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    rotary_dim: int,
    interleaved: bool,
    inverse: bool,
) -> Run | None:
    """All of each head, over copies of queries and keys: liger's has no results of its own."""
    from liger_kernel.ops import rope

    tables = liger_tables(q, cos, sin, rotary_dim, interleaved)
    whole = rotary_dim == q.shape[-1] and _dense(q.transpose(1, 2), k.transpose(1, 2))
    if tables is None or interleaved or not whole:
        return None
    turn = rope.rope_backward if inverse else rope.rope_forward
    copies = q.clone(), k.clone()
    return lambda: turn(*copies, *tables)[:2]


def _softmax(x: Tensor, mask: Tensor | None, scale: float, softcap: float) -> Run | None:
    from liger_kernel.ops import softmax

    if mask is not None or scale != 1 or softcap:
        return None
    return lambda: softmax._softmax_forward(x)[:1]


def _softmax_backward(
    dy: Tensor, y: Tensor, x: Tensor | None, scale: float, softcap: float
) -> Run | None:
    from liger_kernel.ops import softmax

    if scale != 1 or softcap:
        return None
    _, *settings = softmax._softmax_forward(y)  # what its forward chose
    return lambda: (softmax._softmax_backward(dy, y, *settings),)


LIGER: Mapping[str, Peer] = {
    "memopt::norm": _norm,
    "memopt::norm_backward": _norm_backward,
    "memopt::gated": _gated,
    "memopt::gated_backward": _gated_backward,
    "memopt::gated_packed": _gated_packed,
    "memopt::gated_packed_backward": _gated_packed_backward,
    "memopt::rotary": _rotary,
    "memopt::softmax": _softmax,
    "memopt::softmax_backward": _softmax_backward,
}
