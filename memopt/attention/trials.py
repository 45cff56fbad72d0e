"""What held-out data lose under a plan, and how far each head is off."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from memopt.attention.calls import Call, seen_calls
from memopt.attention.layers import LayerSpans, LengthLoss
from memopt.attention.plan import SpanPlan
from memopt.attention.rules import FULL
from memopt.attention.runs import Loss, scalar
from memopt.errors import ConfigError
from memopt.kernels.banded_attention import ATTENTION


def tried(
    model: nn.Module,
    plan: SpanPlan,
    held: Sequence[Any],
    full: Sequence[tuple[int, float]],
    loss: Loss,
) -> SpanPlan:
    """The plan with what the held-out data lose under it, and how far each head is off.

    Args:
        model: in eval mode.
        plan: without losses and errors.
        held: the batches.
        full: what ``held_out`` says of each of them.
        loss: of the model and a batch.
    """
    layers = {layer.name: layer for layer in plan.layers}
    off: dict[str, Tensor] = {}
    whole: dict[str, Tensor] = {}

    def sparse(call: Call, make: Callable[[], Tensor]) -> Tensor:
        layer = layers.get(call.name)
        if layer is None or not layer.rules or not call.is_causal:
            return make()
        exact = make()
        q, k, v = (t.to(exact.dtype) for t in call.qkv)  # as autocast does
        spans = [0 if rule == FULL else rule.span(q.shape[2]) for rule in layer.rules]
        out: Tensor = ATTENTION(q, k, v, spans, [plan.sinks] * layer.heads, call.scale)[0]
        for sums, value in ((off, out - exact), (whole, exact)):
            squares = torch.unflatten(value.double().square(), 1, (layer.heads, -1))
            by_head = squares.sum((0, 2, 3, 4))
            sums[call.name] = sums.get(call.name, 0) + by_head.cpu()
        return out

    by_length: dict[int, list[tuple[float, float]]] = {}
    for batch, (n, exact) in zip(held, full, strict=True):
        by_length.setdefault(n, []).append((exact, held_out(model, batch, loss, sparse)[1]))
    losses = tuple(
        LengthLoss(
            length=n,
            full=sum(one for one, _ in pairs) / len(pairs),
            sparse=sum(other for _, other in pairs) / len(pairs),
            batches=len(pairs),
        )
        for n, pairs in sorted(by_length.items())
    )
    measured = tuple(
        dataclasses.replace(layer, errors=_errors(off, whole, layer)) for layer in plan.layers
    )
    return dataclasses.replace(plan, layers=measured, losses=losses)


def _errors(
    off: dict[str, Tensor], whole: dict[str, Tensor], layer: LayerSpans
) -> tuple[float, ...]:
    if not layer.rules:
        return ()
    if layer.name not in off:
        return (0.0,) * layer.heads
    relative = (off[layer.name] / whole[layer.name].clamp_min(1e-300)).sqrt()
    return tuple(float(f"{error:.4g}") for error in relative.tolist())


def held_out(model: nn.Module, batch: Any, loss: Loss, handler: Any = None) -> tuple[int, float]:
    """Length of the longest causal self-attention, and the loss."""
    lengths = [0]

    def note(call: Call, make: Callable[[], Tensor]) -> Tensor:
        lengths.append(call.arguments["query"].shape[-2] if call.is_causal else 0)
        return handler(call, make) if handler is not None else make()

    with torch.no_grad(), seen_calls(model, note):
        value = float(scalar(loss(model, batch)))
    if not max(lengths):
        raise ConfigError("a held-out batch has no causal self-attention: is it padded?")
    return max(lengths), value
