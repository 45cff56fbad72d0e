"""Put one operator in the place of layer norm and RMS norm, in whatever spelling, and of the add.

Whatever is rounded on the way, the operator computes in float32 and rounds once, so that it is no
further from the truth. The sum that a norm is of is taken into the operator, which returns it to
those who read it besides.

Pays: on a GPU; see ``memopt.kernels.norm``. Does not: on the CPU, where the pass leaves the graph
alone unless it is told otherwise.

Source: see ``memopt.kernels.norm``.
"""

import operator
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

from memopt.emit import emit, same_shape, shape_of, traced
from memopt.kernels.norm import MOST_WIDTH, NORM
from memopt.passes.fusing import (
    Family,
    Found,
    FusePass,
    Rule,
    Written,
    as_result,
    as_wide,
    changes_mode,
    converts,
    widens,
)
from memopt.passes.heads import loosely, overwriter
from memopt.passes.patterns import (
    ADDITIONS,
    POWERS,
    Call,
    Either,
    Inverse,
    Literal,
    Maybe,
    Number,
    Pattern,
    Product,
    Sum,
    Value,
    Where,
    call,
    difference,
    quotient,
    squared,
)
from memopt.passes.row_losses import arguments

_ROOTS = frozenset({torch.sqrt, "sqrt"})
_INVERSE_ROOTS = frozenset({torch.rsqrt, "rsqrt"})
_INVERSES = frozenset({torch.reciprocal, "reciprocal"})
_MEANS = frozenset({torch.mean, "mean"})
_SUMS = frozenset({torch.sum, "sum"})
_VARIANCES = frozenset({torch.var, "var"})
_LAYER_NORMS = frozenset({F.layer_norm, torch.layer_norm})
_RMS_NORMS = frozenset({F.rms_norm, torch.rms_norm})
_LENGTHS = frozenset({F.normalize})


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
_LAYER_NORM = call(
    _LAYER_NORMS,
    "input normalized_shape weight bias eps",
    input=_X,
    normalized_shape=_ANY,
    weight=Maybe(_GAIN),
    bias=Maybe(_BIAS),
    eps=Maybe(Number("eps")),
)
_RMS_NORM = call(
    _RMS_NORMS,
    "input normalized_shape weight eps",
    input=_X,
    normalized_shape=_ANY,
    weight=Maybe(_GAIN),
    eps=Maybe(Number("eps")),
)


def _guard(found: Found) -> str:
    """Why the operator does not compute what was found, or ``""``."""
    x, weight, bias = found["x"], found["weight"], found["bias"]
    width = shape_of(x)[-1] if shape_of(x) else None
    if not isinstance(width, int):
        return "the width changes from call to call"
    if width > MOST_WIDTH:
        return f"{width} entries of a row: the operator takes {MOST_WIDTH} at most"
    if any(row is not None and not same_shape(shape_of(row), (width,)) for row in (weight, bias)):
        return "weight or bias is not one number for each entry of a row"
    if not same_shape(shape_of(found.last), shape_of(x)):
        return "the result has another shape than what is normalised"
    if not traced(x).dtype.is_floating_point or converts(found, x):
        return f"{traced(x).dtype} becomes {found.dtype}"
    if weight is None and widens(found, x):
        return f"the normalised values stay {found.dtype}, and are scaled in another way"
    return ""


def _guard_function(found: Found) -> str:
    """The same for ``layer_norm`` and ``rms_norm``."""
    (node,) = (n for n in found.match.inner if n.target in _LAYER_NORMS | _RMS_NORMS)
    shape = arguments(node, "input normalized_shape")["normalized_shape"]
    if isinstance(shape, (tuple, list)) and len(shape) != 1:
        return f"{len(shape)} dimensions are normalised together"
    return _guard(found)


def _write(graph: fx.Graph, found: Found, *, centred: bool) -> Written:
    """The operator, with the sum that it is of if that can be taken in."""
    eps = found["eps"]
    if eps is None:
        eps = _default_eps(found, centred)
    last, x = found.last, found["x"]
    options = found["weight"], found["bias"], eps, found["offset"] or 0.0, centred
    if _takes_in(found):
        with graph.inserting_before(x):
            results = emit(graph, NORM, (*x.args, *options), like=last)
            y = as_result(found, emit(graph, operator.getitem, (results, 0), like=last))
            total = emit(graph, operator.getitem, (results, 1), like=x)
        return Written("one operator, with the sum that it is of", {last: y, x: total})
    results = emit(graph, NORM, (as_wide(found, x), None, *options), like=last)
    y = as_result(found, emit(graph, operator.getitem, (results, 0), like=last))
    return Written("one operator", {last: y})


def _default_eps(found: Found, centred: bool) -> float:
    """Of a spelling that gives none: PyTorch's for its functions, else none at all."""
    if all(n.target not in _LAYER_NORMS | _RMS_NORMS for n in found.match.inner):
        return 0.0
    wide = torch.promote_types(traced(found["x"]).dtype, torch.float32)
    return 1e-5 if centred else torch.finfo(wide).eps


def _takes_in(found: Found) -> bool:
    """Whether what is normalised is a plain sum in whose place the operator can stand."""
    x, value = found["x"], traced(found["x"])
    terms = [t for t in x.args if isinstance(t, fx.Node)]
    plain = x.target in ADDITIONS and len(x.args) == len(terms) == 2 and not x.kwargs
    if not plain or widens(found, x):
        return False
    if any(
        not same_shape(shape_of(t), shape_of(x)) or traced(t).dtype != value.dtype for t in terms
    ):
        return False
    rows = [row for row in (found["weight"], found["bias"]) if row is not None]
    if any(row > x for row in rows) or changes_mode(x, found.last):
        return False
    trained = any(traced(n).requires_grad for n in (x, *rows))
    same_mode = trained == traced(found.last).requires_grad
    return same_mode and overwriter([x, *rows], x, found.last) is None


def _spellings(
    name: str, value: Pattern, scale: Inverse, why: str, *, centred: bool
) -> tuple[Rule, ...]:
    """One norm without its weight and bias, and with one or both."""

    def write(graph: fx.Graph, found: Found) -> Written:
        return _write(graph, found, centred=centred)

    forms: dict[str, Pattern] = {
        "": Product((value, scale)),
        " with bias": Sum(Product((value, scale)), _BIAS),
        " with weight": Product((value, scale, _GAIN)),
        " with weight and bias": Sum(Product((value, scale, _GAIN)), _BIAS),
    }
    return tuple(
        Rule(name + form, pattern, why, _guard, write) for form, pattern in reversed(forms.items())
    )


_RULES = (
    Rule(
        "layer_norm",
        _LAYER_NORM,
        "torch.nn.LayerNorm; Nemotron adds 1 to the weight",
        _guard_function,
        lambda graph, found: _write(graph, found, centred=True),
    ),
    Rule(
        "rms_norm",
        _RMS_NORM,
        "torch.nn.RMSNorm",
        _guard_function,
        lambda graph, found: _write(graph, found, centred=False),
    ),
    *_spellings("RMS norm", _X, _SCALE, "Llama, T5, Gemma with an offset of 1", centred=False),
    *_spellings("layer norm", _CENTRED, _DEVIATION, "Cohere, and before LayerNorm", centred=True),
)


def _reduced(targets: frozenset[Any], names: str = _MEAN) -> Pattern:
    """The inverse root of any reduction, with an epsilon or without."""
    every = "input dim keepdim dtype unbiased correction".split()
    reduced = Call(targets, names, tuple((name, _ANY) for name in every))
    return _inverse_root(_with_eps(reduced)).factor


_UNKNOWN = (
    "no spelling that is known: over other dimensions, of something else than is scaled by it, "
    "or scaled in another way"
)
_OTHERS = (
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


def _is_anchor(node: fx.Node) -> bool:
    if node.target in POWERS:
        exponent = arguments(node, "input exponent").get("exponent")
        return exponent in (0.5, -0.5)
    return node.target in _INVERSE_ROOTS | _ROOTS | _LAYER_NORMS | _RMS_NORMS | _LENGTHS


_FAMILY = Family("fuse_norms", (*_RULES, *_OTHERS), _is_anchor)


class FuseNorms(FusePass):
    """``x * rsqrt(mean(x * x) + eps) * w`` and its kin -> ``norm(x, w)``."""

    name = "fuse_norms"
    family = _FAMILY
