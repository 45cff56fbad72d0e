"""Find how far every head of a model has to look back, on data.

Three steps: profile what the loss owes to each part of each head's map; search spans that lose
the least of it at a bounded density; and try them on data that were held out. Attention mass, or
how far a head's output is off, are poor guards: what counts is the loss of data that were not
profiled.

Source: MoA: Fu et al. (2024), arXiv:2406.14909.
"""

import dataclasses
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from torch import nn

from memopt.attention.layers import LayerSpans
from memopt.attention.plan import SpanPlan
from memopt.attention.profile import Profile, lost, profiled
from memopt.attention.rules import KINDS, Rule, distinct
from memopt.attention.runs import Loss, data_hash, evaluated, loss_of
from memopt.attention.search import Candidates, choose
from memopt.attention.trials import held_out, tried
from memopt.errors import ConfigError, LossGuardError
from memopt.progress import advancing


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
    run = loss or loss_of
    with evaluated(model):
        profiles = profiled(model, given, run, block)
        seen = _lengths(profiles, lengths)
        ruled = [profile for profile in profiles if profile.is_served]
        rules = distinct([r for kind in kinds for r in KINDS[kind].candidates(seen, block)], seen)
        plans = [
            SpanPlan(
                layers=layers,
                sinks=sinks,
                block=block,
                budget=float(budget),
                guard=float(guard),
                lengths=tuple(seen),
                data_hash=data_hash(given),
                losses=(),
                objective=objective,
            )
            for objective, layers in _searched(profiles, ruled, rules, seen, sinks, block, budget)
        ]
        full = [held_out(model, batch, run) for batch in advancing("full", held)]
        if odd := next((value for _, value in full if not math.isfinite(value)), None):
            raise ConfigError(f"the loss of a held-out batch is {odd}: a finite one is needed")
        found = [tried(model, plan, held, full, run) for plan in advancing("try", plans)]
    best = min(found, key=lambda plan: (math.isnan(plan.loss_change), plan.loss_change))
    if not best.loss_change <= guard:
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
    if isinstance(kinds, str) or not kinds:
        raise ConfigError(f"kinds={kinds!r}: allowed are names of some, of {sorted(KINDS)}")
    for kind in kinds:
        if kind not in KINDS:
            raise ConfigError(f"unknown kind of rule {kind!r}; known: {', '.join(sorted(KINDS))}")


def _lengths(profiles: list[Profile], wanted: Sequence[int] | None) -> list[int]:
    """Those of which every layer has a map, ascending.

    Raises:
        ConfigError: nothing was profiled, or a wanted length is not among them.
    """
    maps = [set(profile.maps) for profile in profiles if profile.is_served]
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
    left_out = [[lost(p.maps[n], rules, n, sinks, block) for n in lengths] for p in ruled]
    density = np.array([[min(r.span(n) + sinks, n) / n for n in lengths] for r in rules])
    sums = {
        "influence": [sum(own) for own in left_out],
        "root": [sum(map(np.sqrt, own)) for own in left_out],
    }
    if len(lengths) > 1:
        sums |= {f"influence at {n}": [o[i] for o in left_out] for i, n in enumerate(lengths)}
    found: dict[tuple[LayerSpans, ...], str] = {}
    for objective, costs in sums.items():
        chosen = iter(choose([Candidates(np.asarray(c), density) for c in costs], budget))
        layers = tuple(
            dataclasses.replace(p.spans, rules=tuple(rules[i] for i in next(chosen)))
            if p.is_served
            else p.spans
            for p in profiles
        )
        found.setdefault(layers, objective)
    yield from ((objective, layers) for layers, objective in found.items())
