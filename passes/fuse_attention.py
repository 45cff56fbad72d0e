"""Put one call in the place of attention that is written out: ``softmax(QKᵀ·s + mask)V``.

Libraries call that eager attention, and much plain PyTorch has it. Its probabilities, as many as
queries times keys for each head, are then read from and written to memory several times, and held
for the backward. The kernels behind ``scaled_dot_product_attention`` hold one number a query.

Written-out code and kernels differ in a query that sees no key. It stays as it is written:

(1) where the mask is a constant by which every query sees a key, there is none;
(2) where a number is filled in that hides for sure, all keys weigh the same and no gradient
    passes to queries and keys; so the query is 0 there, and sees everything;
(3) where infinity is filled in, its result is NaN besides, and so is the gradient of all values;
    the sum of the values times NaN is added there, and times 0 elsewhere;
(4) where the mask is added, the gradient passes as if nothing was hidden, which kernels get
    wrong. Without a gradient they do the same, but for infinity, which is as in (3).

What is none of these is left alone. So are probabilities that something else reads, dropout,
a mask that is trained, which has no kernel, and steps in several dtypes; each with a remark.

Pays: by the probabilities. Exact but for rounding: in 16 bits scores are not rounded any more, and
the result is nearer to the truth; in float32 it is about as near. Does not: where no kernel takes
the call.

Source: T. Dao et al. (2022), arXiv:2205.14135, and M. N. Rabe, C. Staats (2021), arXiv:2112.05682.
"""

import itertools
import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, fx

from memopt._torch import is_traceable_wrapper_subclass, size_expr, size_hint
from memopt.emit import emit, same_shape, shape_of, traced
from memopt.graph import source_line
from memopt.passes.attention_masks import Told, told
from memopt.passes.attention_spellings import WrittenOut, softmaxes, written_out
from memopt.passes.attentions import ATTEND, HEADS, reads_groups, reason_to_write_out
from memopt.passes.constant_masks import MOST
from memopt.passes.contractions import Operand
from memopt.passes.heads import overwriter, stops_gradient, transformed
from memopt.passes.patterns import is_tensor
from memopt.passes.strides import reorder
from memopt.pipeline import PassContext
from memopt.remarks import RemarkKind
from memopt.units import format_bytes


@dataclass(frozen=True)
class FuseAttention:
    """``softmax(q @ k.mT * s + mask) @ v`` -> ``sdpa(q, k, v, mask, scale=s)``.

    Attributes:
        most: numbers that a mask may have to be computed while compiling.
    """

    name: ClassVar[str] = "fuse_attention"
    requires: ClassVar[frozenset[str]] = frozenset()
    establishes: ClassVar[frozenset[str]] = frozenset()
    most: int = MOST

    def __call__(self, graph: fx.Graph, ctx: PassContext) -> int:
        rewrites = 0
        constants: dict[fx.Node, Tensor | str] = {}
        for softmax in list(softmaxes(graph)):
            found = written_out(softmax)
            if found == "":
                continue
            mask: Told | str = Told()
            if isinstance(found, WrittenOut) and not (reason := _reason_against(found)):
                mask = told(graph, found, constants, self.most)
                reason = mask if isinstance(mask, str) else _reason_of_kernels(found, mask)
            elif isinstance(found, str):
                reason = found
            if not reason and isinstance(found, WrittenOut) and isinstance(mask, Told):
                _replace(graph, found, mask)
                rewrites += 1
                kind, text = RemarkKind.APPLIED, _gain(found, mask)
            else:
                kind, text = RemarkKind.MISSED, f"attention stays written out: {reason}"
            ctx.remark(self.name, kind, text, softmax.name, source_line(softmax))
        return rewrites


def _operands(found: WrittenOut) -> tuple[fx.Node, fx.Node, fx.Node]:
    product = found.scores.product
    return product.left.node, product.right.node, found.value.node


def _reason_against(found: WrittenOut) -> str:
    """Why the steps may not become one; empty where they may."""
    operands, last = _operands(found), found.last
    inputs = [*operands, *(mask.node for mask in found.scores.masks)]
    first = min(found.inner)
    if transformed(first, last):
        return "a transform of functions is open"
    if any(is_traceable_wrapper_subclass(traced(n)) for n in inputs):
        return "it is distributed, or of another tensor subclass"
    if shape_of(found.softmax)[-1] == 1:  # kernels leave noise where no gradient passes
        return "there is one key, and nothing to save"
    if len(shape_of(last)) > 4 or len(found.heads) > 2:
        return f"it has {len(shape_of(last))} dimensions"
    several = {tuple(map(size_expr, lead[1:])) for lead in found.scores.leads if len(lead) > 1}
    if len(several) > 1 or not all(isinstance(n, int) for (n,) in several):
        return "its heads are not told from its batch"
    for node in sorted(found.inner):
        if reader := next((u for u in node.users if u not in found.inner | {last}), None):
            return f"{node.name} is also read by {reader.name}"
    if writer := overwriter(inputs, first, last, besides=found.inner):
        return f"{writer.name} overwrites an input in between"
    stopped = next((n for n in sorted(found.inner) if is_tensor(n) and stops_gradient(n)), None)
    if stopped is not None and traced(last).requires_grad:
        return f"no gradient passes {stopped.name}"
    product = found.scores.product.node
    steps = [traced(n).dtype for n in sorted({product, *found.scores.inner, found.softmax})]
    if any(torch.promote_types(a, b) != b for a, b in itertools.pairwise(steps)):
        return "scores are rounded once more before the softmax"
    if len({traced(n).dtype for n in (*operands, product, last)}) > 1:
        return "it is in several dtypes"
    return ""


def _reason_of_kernels(found: WrittenOut, mask: Told) -> str:
    """Why no kernel takes the call, or takes it as it is meant; empty where one does."""
    product, value = found.scores.product, found.value
    query, key = product.left, product.right
    batches = [_batch(side, found) for side in (query, key, value)]
    widths = [shape_of(side.node)[side.order[-1]] for side in (key, value)]
    if not same_shape(batches[1], batches[2]):
        return "keys and values are of other batches or heads"
    if not same_shape(batches[0], batches[1]):
        shared = len(batches[0]) == 2 and same_shape(batches[0][:1], batches[1][:1])
        if not shared or batches[1][1] != 1:
            return "queries are of another batch than keys"
        if not reads_groups(traced(key.node), widths, masked=mask.kind != "none"):
            return "no kernel reads one head of keys for all of queries beside a mask"
    return reason_to_write_out(traced(query.node), widths)


def _batch(side: Operand, found: WrittenOut) -> tuple[Any, ...]:
    """Batch and heads of a side, as the call has them."""
    own = tuple(shape_of(side.node)[d] for d in side.order[:-2])
    whole = len(own) == 1 and same_shape(own, (math.prod(found.heads),))
    return found.heads if whole else own


def _replace(graph: fx.Graph, found: WrittenOut, mask: Told) -> None:
    """Put the call in, and take the steps out."""
    last, product = found.last, found.scores.product
    with graph.inserting_before(last):
        query, key, value = (
            found.with_heads(graph, side.laid_out(graph, last))
            for side in (product.left, product.right, found.value)
        )
        shown, rows = mask.write(graph, found)
        if mask.evens:
            zero = emit(graph, "new_zeros", (query, ()), like=last)
            query = emit(graph, torch.where, (rows, query, zero), like=last)
        options = {"attn_mask": shown, "scale": found.scores.scale}
        if shape_of(key)[HEADS] != shape_of(query)[HEADS]:
            options["enable_gqa"] = True
        y = emit(graph, ATTEND, (query, key, value), options, like=last)
        if mask.kind == "nan":
            zero = emit(graph, "new_zeros", (y, ()), like=last)
            weight = emit(graph, torch.where, (rows, zero, math.nan), like=last)
            if traced(last).requires_grad:
                total = emit(graph, "sum", (value, -2, True), like=last)
                weight = emit(graph, torch.mul, (weight, total), like=last)
            y = emit(graph, torch.add, (y, weight), like=last)
        y = _as_written(graph, found, y)
    last.replace_all_uses_with(y)
    for node in sorted(found.inner | {last}, reverse=True):
        graph.erase_node(node)  # those that wrote in place are no dead code to anyone else


def _as_written(graph: fx.Graph, found: WrittenOut, y: fx.Node) -> fx.Node:
    """The result in the shape and the order of the weighted sum."""
    last, order = found.last, found.sum.order
    if len(order) == 3:
        if len(found.heads) == 1:
            y = emit(graph, "squeeze", (y, HEADS), like=last)
        else:
            y = emit(graph, "flatten", (y, 0, 1), like=last)
    if order != tuple(range(len(order))):
        y = emit(graph, "permute", (y, *order), like=last)
    strides = traced(y).stride(), traced(last).stride()
    if not same_shape(*strides) and reorder(last, traced(y)):
        y = emit(graph, "contiguous", (y,), like=last)
    return y


def _gain(found: WrittenOut, mask: Told) -> str:
    """What is saved, in words."""
    probabilities = traced(found.softmax)
    count = math.prod(size_hint(n) for n in probabilities.shape)
    nbytes = format_bytes(count * traced(found.last).dtype.itemsize)
    held = "held for the backward" if traced(found.last).requires_grad else "written to memory"
    return f"one call{mask.said}: {nbytes} of probabilities are not {held}"
