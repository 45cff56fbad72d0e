"""A training loop of its own, as torchtitan's: compile the step, the model, or each block.

``python docs/examples/plain_loop.py``.
"""

from typing import Any, Literal

import torch
import torch.nn.functional as F
from shared import VOCABULARY, crops
from torch import Tensor, nn
from torch.optim import AdamW

import memopt


class Block(nn.Module):
    """Attention and a gated feed-forward layer, each behind a norm."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.attention_norm, self.feed_norm = nn.RMSNorm(width), nn.RMSNorm(width)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.gate = nn.Linear(width, 4 * width, bias=False)
        self.up = nn.Linear(width, 4 * width, bias=False)
        self.down = nn.Linear(4 * width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Hidden states `(B, S, H)` to hidden states."""
        packed = self.qkv(self.attention_norm(x)).chunk(3, -1)
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in packed)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(y.transpose(1, 2).flatten(2))
        y = self.feed_norm(x)
        return x + self.down(F.silu(self.gate(y)) * self.up(y))


class Transformer(nn.Module):
    """A decoder, its blocks by name as torchtitan has them."""

    def __init__(self, width: int = 64, blocks: int = 4) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, width)
        self.layers = nn.ModuleDict({str(i): Block(width, 4) for i in range(blocks)})
        self.norm = nn.RMSNorm(width)
        self.output = nn.Linear(width, VOCABULARY, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        """Ids `(B, S)` to logits `(B, S, V)`."""
        x = self.embedding(ids)
        for block in self.layers.values():
            x = block(x)
        return self.output(self.norm(x))


def loss_of(model: nn.Module, ids: Tensor) -> Tensor:
    """Cross-entropy of every next token."""
    logits = model(ids)[:, :-1].flatten(0, 1)
    return F.cross_entropy(logits.float(), ids[:, 1:].flatten())


def train(
    options: dict[str, Any] | None = None,
    what: Literal["step", "model", "blocks"] = "step",
    steps: int = 4,
    accumulate: int = 1,
) -> list[float]:
    """The loss of every step.

    Args:
        options: memopt's; None to train without it.
        what: is compiled. The step has the loss in it, whose logits then never exist.
        steps: optimiser steps.
        accumulate: micro-batches of each.
    """
    torch.manual_seed(0)
    model, loss_fn = Transformer(), loss_of
    if options is not None and what == "step":
        loss_fn = memopt.optimize(loss_of, **options)
    elif options is not None and what == "model":
        model.compile(backend="memopt", options=options)
    elif options is not None:
        for block in model.layers.values():
            block.compile(backend="memopt", options=options)
    optimiser = AdamW(model.parameters(), lr=1e-3)
    losses = []
    for batch in crops(4 * steps * accumulate).split(4 * accumulate):
        total = 0.0
        for ids in batch.split(4):
            loss = loss_fn(model, ids) / accumulate
            loss.backward()
            total += loss.item()
        optimiser.step()
        optimiser.zero_grad()
        losses.append(total)
    return losses


if __name__ == "__main__":
    print("without memopt:", train())
    print("the step:      ", train({"memory_budget": 0.8}))
    print("the model:     ", train({"memory_budget": 0.8}, "model"))
    print("its blocks:    ", train({"memory_budget": 0.5}, "blocks"))
