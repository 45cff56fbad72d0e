"""Find how far every head of a model has to look back, on data.

Three steps: profile what the loss owes to each part of each head's map; search spans that lose
the least of it at a bounded density; and try them on data that were held out. Attention mass, or
how far a head's output is off, are poor guards: what counts is the loss of data that were not
profiled.

Source: MoA: Fu et al. (2024), arXiv:2406.14909.
"""

import dataclasses
import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from memopt._torch import pytree
from memopt.attention_calls import Call, seen_calls
from memopt.errors import ConfigError, LossGuardError
from memopt.influence import pooled, shares
from memopt.kernels.banded_attention import ATTENTION
from memopt.progress import advancing
from memopt.span_layers import LayerSpans, LengthLoss
from memopt.span_plan import SpanPlan
from memopt.span_rules import FULL, KINDS, Rule, distinct
from memopt.span_search import Candidates, choose

Loss = Callable[[Any, Any], Tensor]


@dataclass
class Profile:
    """What was seen of one layer.

    Attributes:
        spans: the layer, without rules.
        maps: by length, the mean influence over batches: `(Hk, blocks, blocks)`. A loss that
            is a mean over the sequences of a batch has the mean over these.
        batches: by length, how many of them there were.
        is_causal: whether every call so far was causal self-attention.
    """

    spans: LayerSpans
    maps: dict[int, Tensor] = field(default_factory=dict)
    batches: dict[int, int] = field(default_factory=dict)
    is_causal: bool = True

    def add(self, influence: Tensor, n: int) -> None:
        """Take what one more batch of that length has shown into the mean."""
        count = self.batches[n] = self.batches.get(n, 0) + 1
        before = self.maps.get(n, torch.zeros_like(influence))
        self.maps[n] = before + (influence - before) / count


def calibrate(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    holdout: Iterable[Any],
    budget: float = 0.5,
    guard: float = 0.05,
    lengths: Sequence[int] | None = None,
    block: int = 64,
    sinks: int | None = None,
    kinds: Sequence[str] = ("elastic",),
    loss: Loss | None = None,
) -> SpanPlan:
    """Find a span for each head of keys of a model that calls ``scaled_dot_product_attention``.

    The model is run as it is, in eval mode, without its compiled code, and left as it was.

    Args:
        model: in any dtype, on any device.
        batches: what to profile: for each call of the model a mapping of keyword arguments, a
            tuple of positional ones, or the only one; without padding, each of one length. From
            several lengths, such as 2k, 4k and 8k tokens, it is seen how spans grow.
        holdout: the same, of other data; best of a longer length too.
        budget: the share of keys that the last query may read, over all heads, at every length.
        guard: how much higher, relatively, the loss of the held-out data may be, at any length.
        lengths: that must be among the batches, or None for those that are.
        block: tokens on a side of the blocks in which influence is summed.
        sinks: first tokens that every query sees; None for one block.
        kinds: of the rules to try.
        loss: of the model and a batch, a scalar; None takes the loss out of what the model
            returns, as ``.loss``, as the first of a tuple, or as a lone tensor.

    Returns:
        The plan with the least loss of the held-out data.

    Raises:
        ConfigError: an argument is out of range, or nothing in the model is causal self-attention.
        LossGuardError: the loss of the held-out data rises by more than ``guard``.
    """
    sinks = block if sinks is None else sinks
    _check(budget, guard, block, sinks, kinds)
    given, held = list(batches), list(holdout)
    if not given or not held:
        raise ConfigError(
            f"{len(given)} batches and {len(held)} held-out ones: one of each is needed"
        )
    loss_of = loss or _loss_of
    with _evaluated(model):
        profiles = _profile(model, given, loss_of, block)
        seen = _lengths(profiles, lengths)
        ruled = [profile for profile in profiles if profile.is_causal]
        rules = distinct([r for kind in kinds for r in KINDS[kind].candidates(seen, block)], seen)
        plans = [
            SpanPlan(
                layers=layers,
                sinks=sinks,
                block=block,
                budget=float(budget),
                guard=float(guard),
                lengths=tuple(seen),
                data_hash=_hash(given),
                losses=(),
                objective=objective,
            )
            for objective, layers in _searched(profiles, ruled, rules, seen, sinks, block, budget)
        ]
        full = [_held_out(model, batch, loss_of) for batch in advancing("full", held)]
        tried = [_tried(model, plan, held, full, loss_of) for plan in advancing("try", plans)]
    best = min(tried, key=lambda plan: plan.loss_change)
    if best.loss_change > guard:
        raise LossGuardError(
            f"the held-out loss rises by {best.loss_change:.1%} at a budget of {budget:g}, and "
            f"guard={guard:g} allows {guard:.1%}: raise the budget or the guard",
            plan=best,
        )
    return best


def _check(budget: float, guard: float, block: int, sinks: int, kinds: Sequence[str]) -> None:
    if isinstance(budget, bool) or not (isinstance(budget, int | float) and 0 < budget <= 1):
        raise ConfigError(f"budget={budget!r}: allowed is a share above 0 and up to 1")
    if isinstance(guard, bool) or not (isinstance(guard, int | float) and guard >= 0):
        raise ConfigError(f"guard={guard!r}: allowed is a relative rise of the loss from 0 on")
    for name, value, least in (("block", block, 1), ("sinks", sinks, 0)):
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ConfigError(f"{name}={value!r}: allowed is a number of tokens from {least} on")
    for kind in kinds:
        if kind not in KINDS:
            raise ConfigError(f"unknown kind of rule {kind!r}; known: {', '.join(sorted(KINDS))}")


def _profile(model: nn.Module, batches: list[Any], loss: Loss, block: int) -> list[Profile]:
    """Run every batch forward and backward; the layers that were seen, in order."""
    profiles: dict[str, Profile] = {}
    for batch in advancing("profile", batches):
        made: list[tuple[Call, Tensor]] = []

        def note(
            call: Call, make: Callable[[], Tensor], made: list[tuple[Call, Tensor]] = made
        ) -> Tensor:
            profile = profiles.setdefault(call.name, Profile(_layer(call)))
            profile.is_causal &= call.is_causal and _layer(call) == profile.spans
            out = make()
            if not out.requires_grad and torch.is_grad_enabled():
                out.requires_grad_()  # as in a frozen model
            if profile.is_causal:
                made.append((call, out))
            return out

        with torch.enable_grad(), seen_calls(model, note):
            value = _scalar(loss(model, batch))
        made = [(call, out) for call, out in made if profiles[call.name].is_causal]
        if not made or not value.requires_grad:
            continue
        outs = [out for _, out in made]
        gradients = torch.autograd.grad(value, outs, allow_unused=True)
        for (call, _), gradient in zip(made, gradients, strict=True):
            if gradient is not None:
                q, k, v = call.qkv
                influence = pooled(q, k, v, gradient, call.scale, block)
                profiles[call.name].add(influence, q.shape[2])
    return list(profiles.values())


def _layer(call: Call) -> LayerSpans:
    query = call.arguments["query"]
    return LayerSpans(
        name=call.name,
        query_heads=query.shape[1] if query.dim() == 4 else 1,
        heads=max(1, call.heads),
        width=query.shape[-1],
        scale=call.scale,
    )


def _lengths(profiles: list[Profile], wanted: Sequence[int] | None) -> list[int]:
    """Those of which every layer has a map, ascending.

    Raises:
        ConfigError: nothing was profiled, or a wanted length is not among them.
    """
    maps = [set(profile.maps) for profile in profiles if profile.is_causal]
    seen = sorted(set.intersection(*maps)) if maps else []
    if not seen:
        raise ConfigError(
            f"{len(profiles)} calls of scaled_dot_product_attention were seen, and none is "
            "causal self-attention that the loss depends on in every batch: give batches "
            "without padding, and a model that calls F.scaled_dot_product_attention itself "
            "(attn_implementation='sdpa' in transformers; nn.MultiheadAttention hides the call)"
        )
    if wanted is not None and set(wanted) != set(seen):
        raise ConfigError(f"lengths={sorted(wanted)}: the batches have {seen}")
    return seen


def _searched(
    profiles: list[Profile],
    ruled: list[Profile],
    rules: list[Rule],
    lengths: list[int],
    sinks: int,
    block: int,
    budget: float,
) -> Iterator[tuple[str, tuple[LayerSpans, ...]]]:
    """Layers with rules, by what was minimised."""
    lost = [[_lost(p.maps[n], rules, n, sinks, block) for n in lengths] for p in ruled]
    density = np.array([[min(r.span(n) + sinks, n) / n for n in lengths] for r in rules])
    sums = {"influence": [sum(own) for own in lost], "root": [sum(map(np.sqrt, o)) for o in lost]}
    if len(lengths) > 1:
        sums |= {f"influence at {n}": [o[i] for o in lost] for i, n in enumerate(lengths)}
    found: dict[tuple[LayerSpans, ...], str] = {}
    for objective, costs in sums.items():
        chosen = iter(choose([Candidates(np.asarray(c), density) for c in costs], budget))
        layers = tuple(
            dataclasses.replace(p.spans, rules=tuple(rules[i] for i in next(chosen)))
            if p.is_causal
            else p.spans
            for p in profiles
        )
        found.setdefault(layers, objective)
    yield from ((objective, layers) for layers, objective in found.items())


def _lost(influence: Tensor, rules: list[Rule], n: int, sinks: int, block: int) -> Any:
    """What each rule leaves out of each head's map: `(R, Hk)`."""
    left = influence[:, :, sinks // block :]  # blocks that are sinks as a whole are always seen
    first, blocks = sinks // block, influence.shape[1]
    # The sum along each diagonal: of the block of queries ``d`` behind that of its keys.
    along = [left.diagonal(offset=-(d + first), dim1=1, dim2=2).sum(-1) for d in range(blocks)]
    spans = torch.tensor([min(rule.span(n), n) for rule in rules])
    return (shares(block, spans, blocks) @ torch.stack(along)).numpy()


def _tried(
    model: nn.Module, plan: SpanPlan, held: list[Any], full: list[tuple[int, float]], loss: Loss
) -> SpanPlan:
    """The plan with what the held-out data lose under it, and how far each head is off."""
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
        by_length.setdefault(n, []).append((exact, _held_out(model, batch, loss, sparse)[1]))
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


def _held_out(model: nn.Module, batch: Any, loss: Loss, handler: Any = None) -> tuple[int, float]:
    """Length of the longest causal self-attention, and the loss."""
    lengths = [0]

    def note(call: Call, make: Callable[[], Tensor]) -> Tensor:
        lengths.append(call.arguments["query"].shape[-2] if call.is_causal else 0)
        return handler(call, make) if handler is not None else make()

    with torch.no_grad(), seen_calls(model, note):
        value = float(_scalar(loss(model, batch)))
    if not max(lengths):
        raise ConfigError("a held-out batch has no causal self-attention: is it padded?")
    return max(lengths), value


@contextmanager
def _evaluated(model: nn.Module) -> Iterator[None]:
    """Eval mode, and back to each module's own."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


def _loss_of(model: Any, batch: Any) -> Tensor:
    if isinstance(batch, Mapping):
        out = model(**batch)
    else:
        out = model(*batch) if isinstance(batch, tuple | list) else model(batch)
    found: Any = getattr(out, "loss", None)
    return _scalar(found if found is not None else out[0] if isinstance(out, tuple) else out)


def _scalar(value: Any) -> Tensor:
    if not isinstance(value, Tensor) or value.dim():
        seen = f"of shape {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)
        raise ConfigError(
            f"a scalar loss is needed, and what was found is {seen}: give labels in the batches, "
            "or loss=lambda model, batch: ..."
        )
    return value


def _hash(batches: list[Any]) -> str:
    """Of all numbers in all tensors of the batches."""
    digest = hashlib.sha256()
    for leaf in pytree.tree_leaves(batches):
        if isinstance(leaf, Tensor):
            digest.update(f"{leaf.dtype} {tuple(leaf.shape)}".encode())
            numbers = leaf.detach().cpu().contiguous().flatten().view(torch.uint8)
            digest.update(numbers.numpy().tobytes())
        else:
            digest.update(repr(leaf).encode())
    return digest.hexdigest()[:16]
