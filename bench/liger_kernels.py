"""The kernels of liger-kernel that do what ours do, by the name of our operator.

Each entry takes the arguments of the operator and gives what runs liger's kernel on them, or None
where liger has no such form. What its autograd would do besides is left out.
"""

from collections.abc import Callable, Mapping
from typing import Any

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


LIGER: Mapping[str, Peer] = {
    "memopt::norm": _norm,
    "memopt::norm_backward": _norm_backward,
}
