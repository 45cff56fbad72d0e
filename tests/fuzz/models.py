"""Random models by number: an embedding or numbers, steps in wraps, a head, a loss, outputs."""

import random
from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tests.fuzz.attentions import ATTENTIONS
from tests.fuzz.drawing import Draw, Maker, Size
from tests.fuzz.layers import LAYERS
from tests.fuzz.losses import Loss, class_loss, number_loss
from tests.fuzz.oddities import ODDITIES

MAKERS: tuple[Maker, ...] = (*LAYERS, *ATTENTIONS, *ODDITIES)
MOST_STEPS = 5


class Body(nn.Module):
    """Steps one after another, in what models wrap them in.

    Args:
        seed: of the model.
        size: of the hidden states.
        without: numbers of steps to leave out, to find those that a failure needs.
        makers: what the steps are chosen from.
    """

    def __init__(
        self, seed: int, size: Size, without: Collection[int], makers: Sequence[Maker]
    ) -> None:
        super().__init__()
        self.steps = nn.ModuleList()
        self.norm = nn.LayerNorm(size.width)
        self.wraps: list[str] = []
        for i in range(random.Random(f"{seed} steps").randint(1, MOST_STEPS)):
            draw = Draw(f"{seed} step {i}")
            wrap = draw.of({name: name for name in WRAPS})
            make = random.Random(f"{seed} kind {i}").choice(makers)
            step = make(draw, size)
            step.said = " ".join([str(i), make.__name__, *draw.said])
            if i not in without:
                self.steps.append(step)
                self.wraps.append(wrap)

    def forward(self, h: Tensor) -> list[Tensor]:
        """The hidden states before and after each step."""
        states = [h]
        for i, wrap in enumerate(self.wraps):
            states.append(WRAPS[wrap](self, i, states))
        return states

    def step(self, i: int, h: Tensor) -> Tensor:
        """One step, with numbers kept to where functions are tame."""
        return F.layer_norm(self.steps[i](h), h.shape[-1:])


def _checkpointed(body: Body, i: int, states: list[Tensor]) -> Tensor:
    h: Tensor = checkpoint(body.step, i, states[-1], use_reentrant=False)
    return h


def _broken(body: Body, i: int, states: list[Tensor]) -> Tensor:
    torch._dynamo.graph_break()
    return body.step(i, states[-1])


Wrap = Callable[[Body, int, list[Tensor]], Tensor]

WRAPS: dict[str, Wrap] = {
    "plain": lambda b, i, s: b.step(i, s[-1]),
    "plain ": lambda b, i, s: b.step(i, s[-1]),
    "residual": lambda b, i, s: s[-1] + b.step(i, s[-1]),
    "residual ": lambda b, i, s: s[-1] + b.steps[i](s[-1]),
    "normed": lambda b, i, s: s[-1] + b.step(i, b.norm(s[-1])),
    "post": lambda b, i, s: b.norm(s[-1] + b.steps[i](s[-1])),
    "dropped": lambda b, i, s: s[-1] + F.dropout(b.step(i, s[-1]), 0.1, b.training),
    "parallel": lambda b, i, s: s[-1] + b.step(i, s[-1]) + b.steps[0](s[-1]),
    "again": lambda b, i, s: b.step(i, b.step(i, s[-1])),
    "skip": lambda b, i, s: b.step(i, s[-1]) + s[len(s) // 2],
    "times": lambda b, i, s: b.step(i, s[-1]) * (1 + s[0].sigmoid()),
    "mixed": lambda b, i, s: b.step(i, torch.stack(s).mean(0)),
    "checkpointed": _checkpointed,
    "broken": _broken,
}


def drawn_kind(draw: Draw) -> tuple[str, int]:
    """What goes in and what is wanted, and how many classes there are."""
    kinds = ("tokens to classes",) * 3 + ("numbers to numbers", "numbers to classes")
    return draw.one((*kinds, "tokens to numbers")), draw.one((37, 300))


class RandomModel(nn.Module):
    """Hidden states from ``x``, ``(B, N)`` or ``(B, N, D)``, and a loss against ``y``."""

    def __init__(
        self, seed: int, without: Collection[int] = (), makers: Sequence[Maker] = MAKERS
    ) -> None:
        super().__init__()
        size, draw = Size(2), Draw(f"{seed} model")
        self.kind, self.classes = drawn_kind(draw)
        draw.chance("input_trained", 0.3)
        self.tied = draw.chance("tied") and self.kind == "tokens to classes"
        self.normed = draw.chance("normed")
        self.embedding = nn.Embedding(self.classes, size.width)
        self.head = nn.Linear(size.width, self.classes, bias=draw.chance("bias", 0.3))
        if self.tied:
            self.head.weight = self.embedding.weight
        self.position = nn.Parameter(torch.randn(size.tokens, size.width))
        self.final = nn.LayerNorm(size.width)
        self.body = Body(seed, size, without, makers)
        self.scale = draw.of(SCALES)
        by_classes = self.kind.endswith("classes")
        self.loss: Loss = class_loss(draw, self.classes) if by_classes else number_loss(draw)
        self.returns = draw.of(RETURNS)
        self.writes = draw.chance("writes", 0.1)
        if draw.chance("partly_frozen", 0.2):
            frozen = [p for p in self.parameters() if draw.chance("frozen", 0.4)]
            for parameter in frozen:
                parameter.requires_grad_(False)
        self.said = " ".join(draw.said)

    def extra_repr(self) -> str:
        """What was drawn."""
        return f"{self.said}; wraps {', '.join(self.body.wraps)}"

    def forward(self, x: Tensor, y: Tensor) -> Any:
        h = self.embedding(x) + self.position if x.dtype == torch.int64 else x * 1.0
        states = self.body(h)
        h = self.final(states[-1]) if self.normed else states[-1]
        out = h
        if self.kind.endswith("classes"):
            out = self.scale(self.head(h))
        loss = self.loss(out, y)
        if self.writes and x.is_floating_point() and not x.requires_grad:
            x.mul_(0.5)
        return self.returns(loss, out, states, x)


SCALES: dict[str, Callable[[Tensor], Tensor]] = {
    "as it is": lambda z: z,
    "scaled": lambda z: z * 0.5,
    "divided": lambda z: z / 1.7,
    "capped": lambda z: 30 * torch.tanh(z / 30),
    "in_float32": lambda z: z.float(),
}

Returns = Callable[[Tensor, Tensor, list[Tensor], Tensor], Any]

RETURNS: dict[str, Returns] = {
    "loss": lambda loss, out, states, x: loss,
    "loss ": lambda loss, out, states, x: (loss,),
    "logits": lambda loss, out, states, x: (loss, out),
    "dict": lambda loss, out, states, x: {"loss": loss, "logits": out, "past": None},
    "states": lambda loss, out, states, x: (loss, states[1:]),
    "views": lambda loss, out, states, x: (loss, states[-1], states[-1][:, 0], x),
    "metrics": lambda loss, out, states, x: (
        loss,
        loss.detach(),
        out.argmax(-1),
        out.detach().square().mean(),
        int(out.shape[-1]),
    ),
    "twice": lambda loss, out, states, x: (loss, loss * 2, out.sum()),
    "last": lambda loss, out, states, x: (loss, states[-1].detach(), out[:, -1]),
    "reshaped": lambda loss, out, states, x: (loss.reshape(1), out.transpose(0, 1)),
}
