"""What random models are drawn with: choices that are written down, and steps made of them."""

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

T = TypeVar("T")


class Draw:
    """Random choices that say what they were, so that a failure reads like a model.

    Args:
        seed: equal seeds choose alike, in any process.

    Attributes:
        said: the choices so far.
    """

    def __init__(self, seed: str) -> None:
        self._random = random.Random(seed)
        self.said: list[str] = []

    def of(self, options: Mapping[str, T]) -> T:
        """One of named options."""
        name = self._random.choice(list(options))
        self.said.append(name)
        return options[name]

    def one(self, options: Sequence[T]) -> T:
        """One of a few plain values."""
        value = self._random.choice(options)
        self.said.append(str(value))
        return value

    def chance(self, name: str, share: float = 0.5) -> bool:
        """Whether to do what ``name`` says."""
        chosen = self._random.random() < share
        if chosen:
            self.said.append(name)
        return chosen

    def some(self, options: Sequence[T], most: int) -> list[T]:
        """From one to ``most`` of the options, in a random order."""
        return self._random.sample(options, self._random.randint(1, min(most, len(options))))


@dataclass(frozen=True)
class Size:
    """Of the hidden states ``(B, N, D)`` that go from step to step."""

    batch: int
    tokens: int = 16
    width: int = 32
    heads: int = 4

    @property
    def head(self) -> int:
        """Width of one head."""
        return self.width // self.heads


Run = Callable[[Any, Tensor], Tensor]


class Step(nn.Module):
    """A function ``(B, N, D) -> (B, N, D)`` with parts of its own.

    Args:
        run: of this module, whose attributes the parts are, and of the hidden states.
        parts: modules, parameters, and other tensors, which become buffers.
    """

    def __init__(self, run: Run, **parts: nn.Module | Tensor) -> None:
        super().__init__()
        self.run = run
        self.said = ""
        for name, part in parts.items():
            if isinstance(part, nn.Module | nn.Parameter):
                setattr(self, name, part)
            else:
                self.register_buffer(name, part)

    def forward(self, h: Tensor) -> Tensor:
        return self.run(self, h)

    def extra_repr(self) -> str:
        """What was drawn."""
        return self.said


Maker = Callable[[Draw, Size], Step]


def weight(*shape: int) -> nn.Parameter:
    """Numbers that leave hidden states about as large as they are."""
    return nn.Parameter(torch.randn(*shape) / shape[-1] ** 0.5)
