"""What layer norm and RMS norm look like in a Dynamo graph, and what only looks like one.

In every pattern ``x`` is what is normalised, ``weight`` and ``bias`` are one number for each entry
of a row, ``offset`` is added to the weight and ``eps`` to the mean square.
"""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

from memopt.emit import shape_of
from memopt.passes.arithmetic import Inverse, Product, Sum, difference, quotient, squared
from memopt.passes.heads import loosely
from memopt.passes.patterns import (
    POWERS,
    Call,
    Either,
    Literal,
    Maybe,
    Number,
    Pattern,
    Value,
    Where,
    call,
)
from memopt.passes.row_losses import arguments
from memopt.passes.rules import Rule

_ROOTS = frozenset({torch.sqrt, "sqrt"})
_INVERSE_ROOTS = frozenset({torch.rsqrt, "rsqrt"})
_INVERSES = frozenset({torch.reciprocal, "reciprocal"})
_MEANS = frozenset({torch.mean, "mean"})
_SUMS = frozenset({torch.sum, "sum"})
_VARIANCES = frozenset({torch.var, "var"})
_LAYER_NORMS = frozenset({F.layer_norm, torch.layer_norm})
_RMS_NORMS = frozenset({F.rms_norm, torch.rms_norm})
_LENGTHS = frozenset({F.normalize})
FUNCTIONS = _LAYER_NORMS | _RMS_NORMS

_MEAN = "input dim keepdim"
_VAR = "input dim unbiased keepdim"


def _over_last(node: fx.Node) -> bool:
    """Whether a reduction is over the last dimension alone, and keeps it."""
    own = arguments(node, _VAR if node.target in _VARIANCES else _MEAN)
    rank, dim = len(shape_of(loosely(own["input"]))), own.get("dim")
    dims = list(dim) if isinstance(dim, (tuple, list)) else [dim]
    last = len(dims) == 1 and isinstance(dims[0], int) and dims[0] % max(rank, 1) == rank - 1
    return last and own.get("keepdim") is True


def _is_row(node: fx.Node) -> bool:
    return len(shape_of(node)) == 1


def _is_float(dtype: Any) -> bool:
    return dtype is None or (isinstance(dtype, torch.dtype) and dtype.is_floating_point)


_X = Value("x")
_ANY = Where(lambda value: True)


def _mean(pattern: Pattern) -> Pattern:
    given = {"input": pattern, "dim": _ANY, "keepdim": _ANY, "dtype": Where(_is_float)}
    return call(_MEANS, _MEAN, _over_last, **given)


def _variance(**biased: Pattern) -> Pattern:
    return call(_VARIANCES, _VAR, _over_last, input=_X, dim=_ANY, keepdim=_ANY, **biased)


def _inverse_root(pattern: Pattern) -> Inverse:
    """``1 / sqrt(v)`` in every spelling, and the divisor ``sqrt(v)``."""
    names = "input exponent"
    root = Either(
        (
            call(_ROOTS, "input", input=pattern),
            call(POWERS, names, input=pattern, exponent=Number(0.5)),
        )
    )
    inverse = Either(
        (
            call(_INVERSE_ROOTS, "input", input=pattern),
            call(POWERS, names, input=pattern, exponent=Number(-0.5)),
            call(_INVERSES, "input", input=root),
            quotient(Number(1), root),
        )
    )
    return Inverse(inverse, root)


def _with_eps(pattern: Pattern) -> Pattern:
    return Either((Sum(pattern, Number("eps")), pattern))


_ROW = Value("weight", _is_row)
_GAIN = Either((Sum(Number("offset"), _ROW), _ROW))
_BIAS = Value("bias", _is_row)
_CENTRED = difference(_X, _mean(_X))
_SCALE = _inverse_root(_with_eps(_mean(squared(_X))))
_VARIANCE = Either(
    (
        _mean(squared(_CENTRED)),
        _variance(unbiased=Literal(False)),
        _variance(correction=Literal(0)),
    )
)
_DEVIATION = _inverse_root(_with_eps(_VARIANCE))
LAYER_NORM = call(
    _LAYER_NORMS,
    "input normalized_shape weight bias eps",
    input=_X,
    normalized_shape=_ANY,
    weight=Maybe(_GAIN),
    bias=Maybe(_BIAS),
    eps=Maybe(Number("eps")),
)
RMS_NORM = call(
    _RMS_NORMS,
    "input normalized_shape weight eps",
    input=_X,
    normalized_shape=_ANY,
    weight=Maybe(_GAIN),
    eps=Maybe(Number("eps")),
)


def _forms(value: Pattern, scale: Inverse) -> Mapping[str, Pattern]:
    """One norm with weight and bias, with one of them, and without, by what follows its name."""
    scaled = Product((value, scale, _GAIN))
    plain = Product((value, scale))
    return {
        " with weight and bias": Sum(scaled, _BIAS),
        " with weight": scaled,
        " with bias": Sum(plain, _BIAS),
        "": plain,
    }


RMS_FORMS = _forms(_X, _SCALE)
LAYER_FORMS = _forms(_CENTRED, _DEVIATION)


def _reduced(targets: frozenset[Any], names: str = _MEAN) -> Pattern:
    """The inverse root of any reduction, with an epsilon or without."""
    every = "input dim keepdim dtype unbiased correction".split()
    reduced = Call(targets, names, tuple((name, _ANY) for name in every))
    return _inverse_root(_with_eps(reduced)).factor


_UNKNOWN = (
    "no spelling that is known: over other dimensions, of something else than is scaled by it, "
    "or scaled in another way"
)
NEAR_MISSES = (
    Rule(
        "F.normalize",
        call(_LENGTHS, "input p dim eps", input=_ANY, p=_ANY, dim=_ANY, eps=_ANY),
        "its epsilon bounds the length from below, where a norm's is added to the mean square",
    ),
    Rule(
        "a norm",
        Sum(call(_ROOTS, "input", input=_mean(squared(Value("any")))), Number("eps")),
        "epsilon is added to the root, where a norm's is added to the mean square",
    ),
    Rule("a length", _reduced(_SUMS), "squares are summed, where a norm takes their mean"),
    Rule("a norm", _reduced(_MEANS), _UNKNOWN),
    Rule("a norm", _reduced(_VARIANCES, _VAR), _UNKNOWN),
)


def is_anchor(node: fx.Node) -> bool:
    """Whether a norm, or what looks like one, may be spelled with this node."""
    if node.target in POWERS:
        exponent = arguments(node, "input exponent").get("exponent")
        return exponent in (0.5, -0.5)
    return node.target in _INVERSE_ROOTS | _ROOTS | FUNCTIONS | _LENGTHS
