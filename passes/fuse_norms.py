"""Put one operator in the place of layer norm and RMS norm, in whatever spelling, and of the add.

Whatever is rounded on the way, the operator computes in float32 and rounds once, so that it is no
further from the truth. The sum that a norm is of is taken into the operator, which returns it to
those who read it besides.

Pays: on a GPU; see ``memopt.kernels.norm``. Does not: on the CPU, where the pass leaves the graph
alone unless it is told otherwise.

Source: see ``memopt.kernels.norm``.
"""

import operator
from collections.abc import Mapping
from functools import partial

import torch
from torch import fx

from memopt.emit import emit, same_shape, shape_of, traced
from memopt.kernels.norm import MOST_WIDTH, NORM
from memopt.passes.fusing import Family, FusePass
from memopt.passes.heads import overwriter
from memopt.passes.norm_spellings import (
    FUNCTIONS,
    LAYER_FORMS,
    LAYER_NORM,
    NEAR_MISSES,
    RMS_FORMS,
    RMS_NORM,
    is_anchor,
)
from memopt.passes.patterns import ADDITIONS, Pattern
from memopt.passes.row_losses import arguments
from memopt.passes.rules import (
    Found,
    Rule,
    Written,
    as_result,
    as_wide,
    changes_mode,
    converts,
    widens,
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
    (node,) = (n for n in found.match.inner if n.target in FUNCTIONS)
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
    if all(n.target not in FUNCTIONS for n in found.match.inner):
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


def _rules(name: str, forms: Mapping[str, Pattern], why: str, *, centred: bool) -> list[Rule]:
    """A norm that is written out, in each of its forms."""
    write = partial(_write, centred=centred)
    return [Rule(name + form, pattern, why, _guard, write) for form, pattern in forms.items()]


_RULES = (
    Rule(
        "layer_norm",
        LAYER_NORM,
        "torch.nn.LayerNorm; Nemotron adds 1 to the weight",
        _guard_function,
        partial(_write, centred=True),
    ),
    Rule(
        "rms_norm", RMS_NORM, "torch.nn.RMSNorm", _guard_function, partial(_write, centred=False)
    ),
    *_rules("RMS norm", RMS_FORMS, "Llama, T5, Gemma with an offset of 1", centred=False),
    *_rules("layer norm", LAYER_FORMS, "Cohere, and before LayerNorm", centred=True),
)
_FAMILY = Family("fuse_norms", (*_RULES, *NEAR_MISSES), is_anchor)


class FuseNorms(FusePass):
    """``x * rsqrt(mean(x * x) + eps) * w`` and its kin -> ``norm(x, w)``."""

    name = "fuse_norms"
    family = _FAMILY
