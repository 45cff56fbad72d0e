"""What the loss of a model owes to each part of its heads' maps, over some batches."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from memopt.attention.calls import Call, seen_calls
from memopt.attention.influence import pooled, shares
from memopt.attention.layers import LayerSpans
from memopt.attention.rules import Rule
from memopt.attention.runs import Loss, scalar
from memopt.errors import ConfigError
from memopt.kernels.banded_attention import WIDEST
from memopt.progress import advancing


@dataclass
class Profile:
    """What was seen of one layer.

    Attributes:
        spans: the layer, without rules.
        maps: by length, the mean influence over batches: `(Hk, blocks, blocks)`. A loss that
            is a mean over the sequences of a batch has the mean over these.
        batches: by length, how many of them there were.
        is_served: whether every call so far was causal self-attention that the operator takes.
    """

    spans: LayerSpans
    maps: dict[int, Tensor] = field(default_factory=dict)
    batches: dict[int, int] = field(default_factory=dict)
    is_served: bool = True

    def add(self, influence: Tensor, n: int) -> None:
        """Take what one more batch of that length has shown into the mean."""
        count = self.batches[n] = self.batches.get(n, 0) + 1
        before = self.maps.get(n, torch.zeros_like(influence))
        self.maps[n] = before + (influence - before) / count


def profiled(model: nn.Module, batches: Sequence[Any], loss: Loss, block: int) -> list[Profile]:
    """Run every batch forward and backward; the layers that were seen, in order.

    Args:
        model: in eval mode; parameters get no gradients.
        batches: as `memopt.attention.calibrate` takes them.
        loss: of the model and a batch.
        block: tokens on a side of a block.

    Raises:
        ConfigError: a loss, or its gradient by what a call returns, is not finite.
    """
    profiles: dict[str, Profile] = {}
    for batch in advancing("profile", batches):
        made: list[tuple[Call, Tensor]] = []

        def note(
            call: Call, make: Callable[[], Tensor], made: list[tuple[Call, Tensor]] = made
        ) -> Tensor:
            profile = profiles.setdefault(call.name, Profile(_layer(call)))
            profile.is_served &= _is_served(call) and _layer(call) == profile.spans
            out = make()
            if not out.requires_grad and torch.is_grad_enabled():
                out.requires_grad_()  # as in a frozen model
            if profile.is_served:
                made.append((call, out))
            return out

        with torch.enable_grad(), seen_calls(model, note):
            value = scalar(loss(model, batch))
        made = [(call, out) for call, out in made if profiles[call.name].is_served]
        if not made or not value.requires_grad:
            continue
        outs = [out for _, out in made]
        gradients = torch.autograd.grad(value, outs, allow_unused=True)
        for (call, _), gradient in zip(made, gradients, strict=True):
            if gradient is not None:
                q, k, v = call.qkv
                influence = pooled(q, k, v, gradient, call.scale, block)
                if not influence.isfinite().all():
                    raise ConfigError(
                        f"the loss of a batch is {value.item():g}, and of {call.name!r} some "
                        "scores, or the gradient, are not finite: leave such batches out"
                    )
                profiles[call.name].add(influence, q.shape[2])
    return list(profiles.values())


def _is_served(call: Call) -> bool:
    widths = [call.arguments[name].shape[-1] for name in ("query", "value")]
    return call.is_causal and max(widths) <= WIDEST


def _layer(call: Call) -> LayerSpans:
    query = call.arguments["query"]
    return LayerSpans(
        name=call.name,
        query_heads=query.shape[1] if query.dim() == 4 else 1,
        heads=max(1, call.heads),
        width=query.shape[-1],
        scale=call.scale,
    )


def lost(influence: Tensor, rules: list[Rule], n: int, sinks: int, block: int) -> Any:
    """The influence that each rule leaves out of each head's map of ``n`` tokens: `(R, Hk)`."""
    left = influence[:, :, sinks // block :]  # blocks that are sinks as a whole are always seen
    first, blocks = sinks // block, influence.shape[1]
    # The sum along each diagonal: of the block of queries ``d`` behind that of its keys.
    along = [left.diagonal(offset=-(d + first), dim1=1, dim2=2).sum(-1) for d in range(blocks)]
    spans = torch.tensor([min(rule.span(n), n) for rule in rules])
    return (shares(block, spans, blocks) @ torch.stack(along)).numpy()
