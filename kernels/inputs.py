"""What users hand to a loss: cast as autocast would, checked, and made two-dimensional.

Every check raises ``ConfigError`` with what was seen, what is allowed and the remedy.
"""

import math
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from memopt.errors import ConfigError
from memopt.kernels.blocks import default_chunk_rows

Head = tuple[Tensor, Tensor, Tensor | None]


def one_of(name: str, value: str, *allowed: str) -> None:
    """Check an option that is a word."""
    if value not in allowed:
        raise ConfigError(f"{name}={value!r}: allowed is {', '.join(map(repr, allowed))}")


def within(name: str, value: float, low: float, high: float = math.inf) -> float:
    """Check an option that is a number."""
    if not (low <= value <= high and value < math.inf):
        upper = "" if math.isinf(high) else f" and at most {high}"
        raise ConfigError(f"{name}={value!r}: allowed is a number, at least {low}{upper}")
    return value


def positive(name: str, value: float) -> float:
    """Check an option that divides."""
    if not 0 < value < math.inf:
        raise ConfigError(f"{name}={value!r}: allowed is a number above 0")
    return value


def chunk_size(asked: int | None, rows: int, classes: int, device: torch.device) -> int:
    """Rows of a chunk: what was asked for, or the default."""
    if asked is None:
        return default_chunk_rows(rows, classes, device)
    if asked < 1:
        raise ConfigError(
            f"chunk_rows={asked!r}: allowed is a whole number of rows from 1, or None"
        )
    return asked


def wanted(*tensors: Tensor | None) -> list[bool]:
    """Which gradients will be asked for."""
    on = torch.is_grad_enabled()
    return [on and tensor is not None and tensor.requires_grad for tensor in tensors]


def autocast(tensor: Tensor) -> Tensor:
    """What autocast, where it is on, would make of a matrix product's input."""
    device = tensor.device.type
    eligible = tensor.is_floating_point() and tensor.dtype != torch.float64
    if eligible and torch.is_autocast_enabled(device):
        return tensor.to(torch.get_autocast_dtype(device))
    return tensor


def no_autocast(like: Tensor) -> AbstractContextManager[object]:
    """A loss is written in the dtypes that it needs: autocast must not change them."""
    device = like.device.type
    if torch.is_autocast_enabled(device):
        return torch.autocast(device, enabled=False)
    return nullcontext()


def head(owner: str, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Head:
    """Hidden states `(N, H)`, weight and bias of a linear layer.

    Args:
        owner: prefix of their names, such as ``"teacher_"``.
        hidden: `(..., H)`.
        weight: `(V, H)`.
        bias: `(V,)` or None.
    """
    hidden, weight = autocast(hidden), autocast(weight)
    seen = f"{owner}hidden is {tuple(hidden.shape)} and {owner}weight {tuple(weight.shape)}"
    if hidden.ndim < 1 or weight.ndim != 2 or hidden.shape[-1] != weight.shape[1]:
        raise ConfigError(
            f"{seen}: they are `(..., H)` and `(V, H)`; transpose a weight that is `(H, V)`"
        )
    same_dtype(f"{owner}hidden", hidden, f"{owner}weight", weight)
    if bias is not None:
        bias = autocast(bias)
        per_class(f"{owner}bias", bias, len(weight))
        same_dtype(f"{owner}hidden", hidden, f"{owner}bias", bias)
    return hidden.reshape(-1, hidden.shape[-1]), weight, bias


def pairs(
    x: Tensor, y: Tensor, scale: Tensor | float, *, both: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Embeddings `(N, D)` and `(M, D)`, and a 0-dimensional scale.

    Args:
        x: `(N, D)`.
        y: `(M, D)`.
        scale: a number or a tensor with one element.
        both: whether every ``y`` needs a partner too.
    """
    x, y = autocast(x), autocast(y)
    seen = f"x is {tuple(x.shape)} and y {tuple(y.shape)}"
    if x.ndim != 2 or y.ndim != 2 or x.shape[1] != y.shape[1] or not 0 < len(x) <= len(y):
        raise ConfigError(f"{seen}: allowed are `(N, D)` and `(M, D)` with M >= N > 0")
    if both and len(x) != len(y):
        raise ConfigError(f"{seen}: both directions take N = M; extra rows of y take both=False")
    same_dtype("x", x, "y", y)
    if not isinstance(scale, Tensor):
        wide = torch.promote_types(x.dtype, torch.float32)
        scale = torch.full((), scale, dtype=wide, device=x.device)
    if scale.numel() != 1 or not scale.is_floating_point():
        raise ConfigError(
            f"scale is {tuple(scale.shape)} of {scale.dtype}: allowed is a number, or a tensor "
            "with one floating-point element"
        )
    return x, y, scale.reshape(()).to(x.device)


def target(value: Tensor, leading: torch.Size, classes: int, *, soft: bool = True) -> Tensor:
    """Classes `(N,)` or, where ``soft`` targets may be, distributions `(N, V)`.

    Args:
        value: `(...)`, int64 or, as eager has it, uint8; or `(..., V)`, floating point.
        leading: all sizes of the hidden states but the last.
        classes: their number ``V``.
        soft: whether a distribution is allowed.
    """
    floating = value.is_floating_point()
    if not (floating and soft) and value.dtype not in (torch.int64, torch.uint8):
        distributions = ", or floating point for distributions" if soft else ""
        raise ConfigError(
            f"target is {value.dtype}: allowed is int64 or uint8{distributions}; "
            "call target.long()"
        )
    shape = (*leading, classes) if floating else tuple(leading)
    if tuple(value.shape) != shape:
        kind = "distributions" if floating else "classes"
        raise ConfigError(
            f"target is {tuple(value.shape)}: {kind} for these hidden states are {shape}"
        )
    constant("target", value)
    return value.reshape(-1, classes) if floating else value.reshape(-1).long()


def per_class(name: str, value: Tensor, classes: int) -> None:
    """Check that there is one entry per class."""
    if tuple(value.shape) != (classes,):
        raise ConfigError(
            f"{name} is {tuple(value.shape)}: allowed is ({classes},), one per class"
        )


def constant(name: str, value: Tensor) -> None:
    """Check that nobody waits for a gradient that would never come."""
    if value.requires_grad and torch.is_grad_enabled():
        raise ConfigError(
            f"{name} requires a gradient, which is not computed: call {name}.detach()"
        )


def same_dtype(name: str, value: Tensor, other_name: str, other: Tensor) -> None:
    """Check that a product of the two is possible."""
    if not value.is_floating_point():
        raise ConfigError(f"{name} is {value.dtype}: allowed is floating point")
    if value.dtype != other.dtype:
        raise ConfigError(
            f"{name} is {value.dtype} and {other_name} {other.dtype}: allowed is one dtype; "
            "convert one of them, or use autocast"
        )
