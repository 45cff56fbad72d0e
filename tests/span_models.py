"""Small models and plans for tests of spans."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from memopt.attention import Elastic, LayerSpans, LengthLoss, SpanPlan
from memopt.attention.rules import Rule

OPTIONS: dict[str, Any] = {"lowering": "eager", "strict": True}
SHORT, HALF = Elastic(8, 0), Elastic(4, 4)


def plan_for(
    *layers: tuple[str, int, int, int, Sequence[Rule]],
    sinks: int = 4,
    lengths: tuple[int, ...] = (16, 64),
) -> SpanPlan:
    """A plan of no measurement; of layers name, heads of queries and keys, width and rules."""
    return SpanPlan(
        layers=tuple(
            LayerSpans(
                name=name,
                query_heads=queries,
                heads=heads,
                width=width,
                scale=width**-0.5,
                rules=tuple(rules),
                errors=(0.25,) * len(rules),
            )
            for name, queries, heads, width, rules in layers
        ),
        sinks=sinks,
        block=4,
        budget=0.5,
        guard=0.05,
        lengths=lengths,
        data_hash="0123456789abcdef",
        losses=tuple(LengthLoss(length=n, full=2.0, sparse=2.02, batches=1) for n in lengths),
        objective="influence",
    )


def masked(q: Tensor, k: Tensor, v: Tensor, spans: Sequence[int], sinks: int) -> Tensor:
    """Attention with a mask of ``(Hq, N, M)``, whatever a span operator does."""
    group = q.shape[1] // k.shape[1]
    n, m = q.shape[2], k.shape[2]
    apart = torch.arange(m - n, m)[:, None] - torch.arange(m)
    wide = torch.tensor(spans).repeat_interleave(group)[:, None, None]
    seen = (apart >= 0) & ((apart < wide) | (torch.arange(m) < sinks))
    k, v = (t.repeat_interleave(group, 1) for t in (k, v))
    scores = (q @ k.mT) * q.shape[-1] ** -0.5
    mixed: Tensor = scores.masked_fill(~seen, -torch.inf).softmax(-1) @ v
    return mixed


def compiled(model: Any, plan: Any, *, dynamic: bool | None = None, **options: Any) -> Any:
    """A model under a plan, wherever it saves something or not."""
    torch._dynamo.reset()
    passes = {"sparse_attention": {"plan": plan, "always": True}}
    given = OPTIONS | {"passes": passes} | options
    return torch.compile(model, backend="memopt", dynamic=dynamic, options=given)
