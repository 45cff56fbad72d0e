"""How well spans by plan keep what a model looks up in its past, beside windows of one size.

A small model learns to go on with a sequence that repeats itself: to find the token behind the
last occurrence of the present one. Some of its heads need the whole sequence, and most need next
to nothing; a window of the same size for all of them has to leave out what is looked up.

Source: induction heads are of Olsson et al. (2022), arXiv:2209.11895.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from memopt.attention import Elastic, SpanPlan, calibrate

CASE = "retrieval"
WORDS, WIDTH, HEADS, LAYERS, LENGTH = 32, 64, 4, 2, 64
BLOCK, SINKS = 4, 4
BUDGET = 0.4


class Attention(nn.Module):
    """Causal self-attention with rotary positions and a residual; ``kv_heads`` of keys."""

    def __init__(self, kv_heads: int) -> None:
        super().__init__()
        self.norm, self.width = nn.LayerNorm(WIDTH), WIDTH // HEADS
        self.heads = (HEADS, kv_heads, kv_heads)
        self.project = nn.Linear(WIDTH, self.width * sum(self.heads), bias=False)
        self.out = nn.Linear(WIDTH, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        heads = self.project(self.norm(x)).unflatten(-1, (-1, self.width)).transpose(1, 2)
        q, k, v = heads.split(self.heads, dim=1)
        mixed = F.scaled_dot_product_attention(
            _turned(q), _turned(k), v, is_causal=True, enable_gqa=self.heads[1] < HEADS
        )
        y: Tensor = x + self.out(mixed.transpose(1, 2).flatten(2))
        return y


def _turned(x: Tensor) -> Tensor:
    """Rotary positions."""
    length, width = x.shape[-2:]
    speeds = 10000.0 ** (-torch.arange(0, width, 2, device=x.device) / width)
    angles = torch.arange(length, device=x.device)[:, None] * speeds
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    a, b = x.chunk(2, -1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], -1)


class Retriever(nn.Module):
    """Two layers of attention, and nothing else: token ids to logits."""

    def __init__(self, kv_heads: int = HEADS) -> None:
        super().__init__()
        self.embed = nn.Embedding(WORDS, WIDTH)
        self.layers = nn.ModuleList(Attention(kv_heads) for _ in range(LAYERS))
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, WORDS, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x)
        logits: Tensor = self.head(self.norm(x))
        return logits


Batch = tuple[Tensor, Tensor]


def repeats(seed: int, count: int, length: int = LENGTH) -> Batch:
    """Random tokens that repeat after a quarter to a half of ``LENGTH``; what comes next.

    Targets are -100 until the sequence repeats itself.
    """
    generator = torch.Generator().manual_seed(seed)
    period = torch.randint(LENGTH // 4, LENGTH // 2 + 1, (count, 1), generator=generator)
    tokens = torch.randint(0, WORDS, (count, LENGTH), generator=generator)
    at = torch.arange(length + 1)
    ids = tokens.gather(1, at % period)
    known = at[None, :-1] >= period
    return ids[:, :-1], ids[:, 1:].masked_fill(~known, -100)


def loss(model: Any, batch: Batch) -> Tensor:
    """Of what is to be looked up."""
    ids, targets = batch
    device = next(model.parameters()).device
    logits = model(ids.to(device)).flatten(0, 1)
    return F.cross_entropy(logits, targets.flatten().to(device))


def trained(seed: int = 0, kv_heads: int = HEADS, enough: float = 0.02) -> Retriever:
    """A model that looks up, trained until the loss is ``enough``: seconds, on one core."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = Retriever(kv_heads)
    optimizer = torch.optim.AdamW(model.parameters(), 5e-3, weight_decay=0.01)
    for step in range(1000):
        value = loss(model, repeats(1000 * seed + step, 32))
        optimizer.zero_grad()
        value.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        if value.item() < enough:
            break
    return model.eval()


@torch.no_grad()
def accuracy(
    model: Callable[[Tensor], Tensor], length: int = LENGTH, device: str = "cpu"
) -> float:
    """The share of tokens that are looked up, of sequences that no one has seen."""
    ids, targets = repeats(-1, 256, length)
    known = targets >= 0
    guessed = model(ids.to(device)).argmax(-1).cpu()
    return float((guessed == targets)[known].float().mean())


def planned(model: nn.Module, budget: float = BUDGET, guard: float = 1.0) -> SpanPlan:
    """A plan of spans for a retriever."""
    return calibrate(
        model,
        [repeats(-10 - i, 32) for i in range(4)],
        holdout=[repeats(-20 - i, 64) for i in range(2)],
        budget=budget,
        guard=guard,
        block=BLOCK,
        sinks=SINKS,
        loss=loss,
    )


def uniform(plan: SpanPlan) -> SpanPlan:
    """A plan that reads as many keys with the same span for all heads."""
    span = round(plan.density(LENGTH) * LENGTH) - plan.sinks
    layers = tuple(
        dataclasses.replace(layer, rules=(Elastic(span, 0),) * layer.heads)
        for layer in plan.layers
    )
    return dataclasses.replace(plan, layers=layers)


def compiled(model: nn.Module, plan: SpanPlan) -> Any:
    """The model under a plan."""
    passes = {"sparse_attention": {"plan": plan, "always": True}}
    options: dict[str, Any] = {"passes": passes, "lowering": "eager", "strict": True}
    return torch.compile(model, backend="memopt", options=options)


def run(device: str, say: Callable[[object], None]) -> list[dict[str, Any]]:
    """One row for each way to attend: the share of tokens that are looked up, and keys read."""
    model = trained().to(device)
    plan = planned(model)
    full = accuracy(model, device=device)
    found: list[tuple[str, float, float]] = [("full", 1.0, full)]
    for peer, one in (("spans by plan", plan), ("one window", uniform(plan))):
        torch._dynamo.reset()
        found.append((peer, one.density(LENGTH), accuracy(compiled(model, one), device=device)))
    rows = []
    for peer, density, right in found:
        say(
            f"{CASE}: {peer}: accuracy {right:.3f}, {right / full:.3f} of full, keys {density:.3f}"
        )
        figures = {"density": density, "accuracy": right, "of_full": right / full}
        rows.append({"kind": CASE, "case": CASE, "peer": peer, "status": "ok"} | figures)
    return rows
