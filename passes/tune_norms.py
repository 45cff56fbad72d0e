"""Make the gradient of a scale behind a layer from the layer's weight, not from its result.

A norm with running statistics multiplies each channel of a convolution by a number, and so do a
layer scale and a frozen norm with a trained affine. The number's gradient is a sum over products
with the convolution's result, which nothing else in the backward needs. That sum is the weight
times its own gradient, channel by channel, once the gradient is made before the scale:
``sum(d * (w @ x)) = sum(w * (d @ x))``. So the input is held, and the result is not.

Runs under a budget, or where the options name it. Pays: the bytes of every such result, and
reading them. Exact up to the order of sums, which is now that of the weight's gradient; the
forward is untouched, and a scale of 0 has the gradient it had.

Does not: where the layer is frozen, since the gradient of its weight is a product more; in low
precision, where that gradient is rounded before it is summed.

Source: the mode "Tune" of You et al. (2024), "Efficient ConvBN Blocks for Transfer Learning and
Beyond", arXiv:2305.11624, who rewrite the forward; that the backward alone can do it is memopt's.
"""

import operator
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, ClassVar, NamedTuple

import torch
from torch import fx

from memopt._torch import size_hint, stable_topological_sort
from memopt.graph import aten, backward_nodes, source_line
from memopt.passes.channels import (
    ADD,
    MULTIPLY,
    NEGATE,
    SUBTRACT,
    SUM,
    Chain,
    Step,
    as_vector,
    chains,
    same_shape,
    step_again,
    sums_all_but,
    undo_one_another,
    view_again,
)
from memopt.passes.joint_nodes import call
from memopt.passes.weight_gradients import WeightGradient, weight_gradients
from memopt.pipeline import PassContext
from memopt.remarks import RemarkKind

_NORM_BACKWARD = aten.native_batch_norm_backward.default
_PRECISE = (torch.float32, torch.float64)


class _Use(NamedTuple):
    """A sum by channel of a layer's result and its gradient.

    Attributes:
        total: the sum.
        d: how the layer's gradient is made of the sum's first factor.
        y: how the other factor is made of the layer's result.
    """

    total: fx.Node
    d: Chain
    y: Chain


@dataclass(frozen=True)
class TuneNorms:
    """``sum(d * y)`` -> ``sum(w * dw) + b * sum(d)``, by channel, where ``y`` is ``w @ x + b``.

    Attributes:
        most: how many times the numbers of a layer's result its weight may have. Weights are
            scaled and multiplied in the backward, so a large one costs more than it saves.
    """

    name: ClassVar[str] = "tune_norms"
    requires: ClassVar[frozenset[str]] = frozenset()
    establishes: ClassVar[frozenset[str]] = frozenset()
    most: float = 4

    def __call__(self, graph: fx.Graph, ctx: PassContext) -> int:
        named = ctx.config.enabled(self.name, default=False)
        if ctx.config.memory_budget.kind == "none" and not named:
            return 0
        layers = [*weight_gradients(graph, backward_nodes(graph))]
        rewrites = sum(self._rewrite(graph, layer, ctx) for layer in layers)
        if rewrites:
            stable_topological_sort(graph)
        return rewrites

    def _rewrite(self, graph: fx.Graph, layer: WeightGradient, ctx: PassContext) -> int:
        rewrites = 0
        while use := _whole(layer) or next(_uses(layer), None):
            y = use.y.source
            if reason := self._reason_against(layer, use):
                ctx.remark(self.name, RemarkKind.MISSED, reason, y.name, source_line(y))
                break
            if use.total.target is operator.getitem:
                _spell_out(graph, use.total.args[0])
                continue
            with graph.inserting_before(layer.node):
                layer = _replace(graph, layer, use)
            text = (
                f"{use.total.name}, a scale's gradient, is made of its weight's: not of {y.name}"
            )
            ctx.remark(self.name, RemarkKind.APPLIED, text, y.name, source_line(y))
            rewrites += 1
        return rewrites

    def _reason_against(self, layer: WeightGradient, use: _Use) -> str:
        """Why the sum is left as it is; empty where it is not."""
        if not layer.is_trained:
            return "held for a scale's gradient: its weight is frozen, and has none to make it of"
        weight, bias = layer.parts(use.y.source)
        own, result = (size_hint(n.meta["val"].numel()) for n in (weight, use.y.source))
        if own > self.most * result:
            return f"held for a scale's gradient: {result} numbers, where its weight has {own}"
        nodes = [use.total, use.d.source, use.y.source, layer.dy, weight]
        nodes += [n for n in (bias,) if n is not None]
        nodes += [
            s.operand for s in (*use.d.steps, *use.y.steps) if isinstance(s.operand, fx.Node)
        ]
        dtypes = {node.meta["val"].dtype for node in nodes}
        if len(dtypes) > 1 or not dtypes.issubset(_PRECISE):
            names = ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes))
            return f"held for a scale's gradient, which its weight's is too coarse for, in {names}"
        return ""


def _uses(layer: WeightGradient) -> Iterator[_Use]:
    for d in chains(layer.dy, 1):
        if not d.is_linear:
            return
        for product in [n for n in d.source.users if n.target is MULTIPLY and len(n.args) == 2]:
            factors = [n for n in product.all_input_nodes if n is not d.source]
            if not factors or not same_shape(factors[0], product):
                continue
            for total in [n for n in product.users if n.users and sums_all_but(n, d.axis)]:
                for y in chains(factors[0], d.axis):
                    if layer.is_of(y.source) and undo_one_another([*y.views, *d.views]):
                        yield _Use(total, d, y)


def _replace(graph: fx.Graph, layer: WeightGradient, use: _Use) -> WeightGradient:
    """Make the sum without the layer's result; the graph is positioned before the layer's node."""
    d = view_again(graph, use.d.source, use.d.views)
    total = _sum_by_channel(graph, use.d)
    new, own = layer.unscaled(graph, d, use.d.steps, total)
    product, shift = layer.sums(graph, own, use.y.source), layer.parts(use.y.source)[1]
    for step in use.y.steps:
        if step.target not in (ADD, SUBTRACT):
            product = step_again(graph, step, product, [-1])
            shift = shift if shift is None else step_again(graph, step, shift, [-1])
            continue
        if step.target is SUBTRACT and step.turned:
            product = call(graph, NEGATE, product, like=product)
        if shift is not None:
            shift = step_again(graph, step, shift, [-1])
        else:
            shift = as_vector(graph, step.operand)
            if step.target is SUBTRACT and not step.turned:
                shift = call(graph, NEGATE, shift, like=shift)
    if shift is not None:
        shift = call(graph, MULTIPLY, total, shift, like=product)
        product = call(graph, ADD, product, shift, like=product)
    shape = [*use.total.meta["val"].shape]
    use.total.replace_all_uses_with(call(graph, aten.view.default, product, shape, like=use.total))
    return new


def _sum_by_channel(graph: fx.Graph, chain: Chain) -> fx.Node:
    """A gradient's sums, which a norm's shift mostly has the graph make anyway."""
    node, rank = chain.source, chain.source.meta["val"].dim()
    found = next((n for n in node.users if sums_all_but(n, chain.axis)), None)
    if found is None:
        rest = [axis for axis in range(rank) if axis != chain.axis]
        found = call(graph, SUM, node, rest, like=node)
    vector: fx.Node = as_vector(graph, found)
    return vector


def _whole(layer: WeightGradient) -> _Use | None:
    """The norm behind a layer whose backward is one operator: its gradient of the scale."""
    (*_, chain) = chains(layer.dy, 1)
    (norm,) = chain.source.all_input_nodes[:1] or [chain.source]
    if norm.target is not _NORM_BACKWARD or chain.source.args[1] != 0 or chain.axis != 1:
        return None
    arguments: Any = norm.args
    d, y, scale, mean, *_, trains, _, _ = arguments
    total = next((n for n in norm.users if n.args[1] == 1 and n.users), None)
    inner = next((c for c in chains(y, 1) if layer.is_of(c.source)), None)
    if trains or scale is None or total is None or inner is None:
        return None
    own = Chain(d, 1, (Step(MULTIPLY, scale), *chain.steps), chain.views)
    if not own.is_linear or not undo_one_another([*inner.views, *chain.views]):
        return None
    return _Use(total, own, replace(inner, steps=(*inner.steps, Step(SUBTRACT, mean))))


def _spell_out(graph: fx.Graph, norm: Any) -> None:
    """Write a norm's backward as the products and sums it is."""
    d, y, scale, mean, variance, _, _, _, epsilon, _ = norm.args
    rank = y.meta["val"].dim()
    rest, shape = [0, *range(2, rank)], [1, -1] + [1] * (rank - 2)

    def make(target: Any, *args: Any) -> fx.Node:
        return call(graph, target, *args, like=norm)

    with graph.inserting_before(norm):
        inverse = make(aten.rsqrt.default, make(ADD, variance, epsilon))
        factor = make(aten.view.default, make(MULTIPLY, inverse, scale), shape)
        centred = make(SUBTRACT, y, make(aten.view.default, mean, shape))
        results = (
            make(MULTIPLY, d, factor),
            make(MULTIPLY, make(SUM, make(MULTIPLY, d, centred), rest), inverse),
            make(SUM, d, rest),
        )
    for part in norm.users:
        part.replace_all_uses_with(results[part.args[1]])
