"""What takes liger-kernel several launches, or torch's operators beside its own, and us one.

Each entry takes the arguments of our operator, where `bench.liger_kernels` has nothing for them,
and gives the same work as a model has it done that uses liger's kernels: theirs, torch's for the
rest, and copies where theirs read no views. Dropout, which liger does not have, is torch's.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bench.liger_kernels import LIGER, Run, activations, liger_tables
from memopt.kernels.bits import unpack
from memopt.kernels.gated_packed import halves


@dataclass(frozen=True, slots=True, kw_only=True)
class Composition:
    """Several launches that do together what one of our operators does.

    Attributes:
        words: which, in their order.
        run: launches them; gives the results of our operator, None where it has none.
    """

    words: str
    run: Run


def _norm(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    offset: float,
    centred: bool,
) -> Composition | None:
    """A layer norm of a sum; liger adds in front of its RMS norm only."""
    from liger_kernel.ops.layer_norm import layer_norm_forward

    if not centred or residual is None or weight is None or bias is None or offset:
        return None

    def run() -> Any:
        total = x + residual
        y, _, mean, rstd, *_ = layer_norm_forward(total, weight, bias, eps)
        return y, total, mean, rstd

    return Composition(words="torch's add, liger's layer norm", run=run)


def _norm_backward(
    dy: Tensor,
    dtotal: Tensor | None,
    total: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    offset: float,
    wanted: list[bool],
    again: bool,
) -> Composition | None:
    """The gradient of a sum's other reader is added to a layer norm's; the norm is made again."""
    centred = mean.numel() > 0
    added = dtotal if centred else None
    given = None if centred else dtotal
    backward = LIGER["memopt::norm_backward"](
        dy, given, total, weight, bias, mean, rstd, offset, wanted, False
    )
    eps = 1e-5 if centred else 1e-6  # what is usual: a backward has the statistics in its place
    forward = LIGER["memopt::norm"](total, None, weight, bias, eps, offset, centred)
    if backward is None or forward is None or (added is None and not again):
        return None

    def run() -> Any:
        dx, *_ = others = backward()
        if added is not None:
            dx = dx + added.view_as(dx)
        of_weight, of_bias = others[1:] if centred else (others[-1], None)
        return dx, of_weight, of_bias, forward()[0] if again else None

    name = "layer norm" if centred else "RMS norm"
    words = f"liger's {name} backward"
    words += "" if added is None else ", torch's add"
    return Composition(words=words + (f", liger's {name}" if again else ""), run=run)


def _gated(gate: Tensor, up: Tensor, activation: str) -> Composition | None:
    """Of views, which liger's kernels take copies of; the squared ReLU, which has no gate.

    Where entries of a row are apart ours takes copies, too.
    """
    from liger_kernel.ops.relu_squared import relu_squared_forward

    if not gate.numel():
        return None
    if activation == "relu_squared" and gate.stride(-1) == 1:
        return Composition(
            words="copy, liger's squared ReLU, torch's mul",
            run=lambda: (relu_squared_forward(gate.contiguous()) * up,),
        )
    kernels = activations(activation)
    if kernels is None:
        return None
    return Composition(
        words="copies, liger's gate",
        run=lambda: kernels[0](gate.contiguous(), up.contiguous())[2:],
    )


def _gated_backward(
    dy: Tensor, gate: Tensor, up: Tensor, activation: str, again: bool
) -> Composition | None:
    """Of views, and where the result is made again: by liger's forward once more."""
    kernels = activations(activation)
    if kernels is None or not gate.numel():
        return None
    # Liger's backward writes over them; of views it has copies.
    a, b = (t.clone() if t.is_contiguous() else t for t in (gate, up))

    def run() -> Any:
        one, two = a.contiguous(), b.contiguous()
        y = kernels[0](one, two)[2] if again else None
        return *kernels[1](one, two, dy), y

    words = "" if a.is_contiguous() and b.is_contiguous() else "copies, "
    words += "liger's gate, " if again else ""
    return Composition(words=f"{words}liger's gate backward", run=run)


def _gated_packed(x: Tensor, activation: str, gate_last: bool) -> Composition | None:
    """Of what liger's kernel for both halves does not take."""
    return _gated(*halves(x, gate_last), activation)


def _gated_packed_backward(
    dy: Tensor, x: Tensor, activation: str, gate_last: bool, again: bool
) -> Composition | None:
    """The same, with the halves' gradients put together."""
    forward = LIGER["memopt::gated_packed"](x, activation, gate_last)
    backward = LIGER["memopt::gated_packed_backward"](dy, x, activation, gate_last, False)
    if forward is not None and backward is not None:
        words = "liger's gate, liger's gate backward"
        return Composition(words=words, run=lambda: (*backward(), *forward()))
    apart = _gated_backward(dy, *halves(x, gate_last), activation, again)
    if apart is None:
        return None

    def run() -> Any:
        dgate, dup, y = apart.run()
        return torch.cat((dup, dgate) if gate_last else (dgate, dup), -1), y

    return Composition(words=f"{apart.words}, torch's cat", run=run)


def _rotary(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    rotary_dim: int,
    interleaved: bool,
    inverse: bool,
) -> Composition | None:
    """Of copies, since liger's turns in place and our operator keeps its queries and keys.

    Liger's pairs lie half a head apart. Those that lie side by side are put so by the operator
    that copies them, and back by another.
    """
    from liger_kernel.ops import rope

    tables = liger_tables(q, cos, sin, rotary_dim, interleaved)
    if tables is None:
        return None
    turn = rope.rope_backward if inverse else rope.rope_forward
    order = torch.arange(q.shape[-1], device=q.device)
    order[:rotary_dim] = order[:rotary_dim].view(-1, 2).t().flatten()
    back = order.argsort()

    def run() -> Any:
        given = [t.transpose(1, 2) for t in (q, k)]  # the layout that liger turns
        if not interleaved:
            copies = [t.clone(memory_format=torch.contiguous_format) for t in given]
            return turn(*(t.transpose(1, 2) for t in copies), *tables)[:2]
        copies = [t.index_select(-1, order) for t in given]
        turned = turn(*(t.transpose(1, 2) for t in copies), *tables)[:2]
        return [t.transpose(1, 2).index_select(-1, back).transpose(1, 2) for t in turned]

    words = "torch's index_select, liger's rope, torch's index_select"
    return Composition(words=words if interleaved else "copies, liger's rope", run=run)


def _softmax(x: Tensor, mask: Tensor | None, scale: float, softcap: float) -> Composition | None:
    """With a scale, a cap and a mask, each of which is an operator of its own."""
    from liger_kernel.ops import softmax

    factor = scale / (softcap or 1.0)
    steps: list[tuple[str, Callable[[Tensor], Tensor]]] = []
    if factor != 1:
        steps.append(("mul", lambda z: z * factor))
    if softcap:
        steps += [("tanh", torch.tanh), ("mul", lambda z: z * softcap)]
    if mask is not None:
        steps.append(("add", lambda z: z + mask))
    if not steps:
        return None

    def run() -> Any:
        z = x
        for _, step in steps:
            z = step(z)
        return softmax._softmax_forward(z)[:1]

    names = ", ".join(name for name, _ in steps)
    return Composition(words=f"torch's {names}, liger's softmax", run=run)


def _softmax_backward(
    dy: Tensor, y: Tensor, x: Tensor | None, scale: float, softcap: float
) -> Composition | None:
    """The same; autograd has saved the tangent."""
    if scale == 1 and not softcap:
        return None
    backward = LIGER["memopt::softmax_backward"](dy, y, None, 1.0, 0.0)
    assert backward is not None
    tangent = (x * (scale / softcap)).tanh() if x is not None and softcap else None

    def run() -> Any:
        (dz,) = backward()
        if tangent is not None:
            dz = torch.ops.aten.tanh_backward(dz, tangent)
        return (dz * scale if scale != 1 else dz,)

    words = "liger's softmax backward"
    words += "" if tangent is None else ", torch's tanh backward"
    return Composition(words=words + ("" if scale == 1 else ", torch's mul"), run=run)


def _dropout(x: Tensor, seed: Tensor, p: float) -> Composition | None:
    """Its mask has a byte for each entry, and other numbers."""
    if not x.is_contiguous():
        return None
    return Composition(
        words="torch's dropout", run=lambda: torch.ops.aten.native_dropout(x, p, True)
    )


def _apply_bits(dy: Tensor, bits: Tensor, factor: float) -> Composition | None:
    """The backward of that dropout."""
    if not dy.is_contiguous():
        return None
    (mask,) = unpack(bits, list(dy.shape))
    return Composition(
        words="torch's dropout backward",
        run=lambda: (torch.ops.aten.native_dropout_backward(dy, mask, factor),),
    )


FUSED: Mapping[str, Callable[..., Composition | None]] = {
    "memopt::norm": _norm,
    "memopt::norm_backward": _norm_backward,
    "memopt::gated": _gated,
    "memopt::gated_backward": _gated_backward,
    "memopt::gated_packed": _gated_packed,
    "memopt::gated_packed_backward": _gated_packed_backward,
    "memopt::rotary": _rotary,
    "memopt::softmax": _softmax,
    "memopt::softmax_backward": _softmax_backward,
    "memopt::dropout_bits": _dropout,
    "memopt::apply_bits": _apply_bits,
}
