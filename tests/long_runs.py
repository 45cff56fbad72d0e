"""Many steps of a small language model on real text, and what a process holds meanwhile."""

import gc
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from bench.demo import TEXT, encode
from bench.zoo.hugging_face import gpt2, llama
from bench.zoo.language import LanguageModel

BATCH, LENGTH = 2, 32


class Returning(nn.Module):
    """A plain model, called as those of transformers are."""

    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.own = LanguageModel(2, 32, 64, 300, 4, dropout=dropout)

    def forward(self, input_ids: Tensor, labels: Tensor) -> SimpleNamespace:
        loss = self.own(input_ids[:, :-1], labels[:, 1:])
        return SimpleNamespace(loss=loss)


def family(name: str, *, dropout: bool = False) -> nn.Module:
    """A tiny model in float64; equal numbers every time.

    Args:
        name: ``"plain"`` computes in float64 all through; the losses of transformers' models are
            computed in float32.
        dropout: whether it trains with dropout.
    """
    torch.manual_seed(0)
    size: dict[str, Any] = {"batch": BATCH, "length": LENGTH}
    makers: dict[str, Callable[[], Any]] = {
        "plain": lambda: Returning(0.1 if dropout else 0.0),
        "gpt2": lambda: gpt2(2, 300, 32, 4, **size).build(),
        "llama": lambda: llama(2, 300, 32, 64, 4, 2, **size).build(),
    }
    model: nn.Module = makers[name]().double()
    return model.train(dropout)


def batches(steps: int, lengths: tuple[int, ...] = (LENGTH,)) -> list[dict[str, Tensor]]:
    """Crops of the text, in characters; of these lengths, in turn."""
    tokens, _ = encode(TEXT.read_text(encoding="utf-8"))
    generator = torch.Generator().manual_seed(1)
    found = []
    for step in range(steps):
        length = lengths[step % len(lengths)]
        starts = torch.randint(0, len(tokens) - length, (BATCH,), generator=generator)
        ids = torch.stack([tokens[s : s + length] for s in starts.tolist()])
        found.append({"input_ids": ids, "labels": ids})
    return found


def curve(run: Any, model: nn.Module, data: list[dict[str, Tensor]]) -> Tensor:
    """The losses of training by AdamW, one a batch."""
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = []
    for step, batch in enumerate(data):
        torch.manual_seed(step)
        loss = run(**batch).loss
        loss.backward()
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        losses.append(loss.detach())
    return torch.stack(losses)


@dataclass(frozen=True)
class Held:
    """What a process holds between two steps.

    Attributes:
        resident_bytes: of the process.
        tensor_bytes: of the storages of all tensors that Python knows.
        tensors: how many.
        objects: that Python's collector follows.
    """

    resident_bytes: int
    tensor_bytes: int
    tensors: int
    objects: int

    @classmethod
    def now(cls) -> "Held":
        """After a collection."""
        gc.collect()
        tensors = [o for o in gc.get_objects() if type(o) in (Tensor, nn.Parameter)]
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return cls(pages * 4096, sum(storages.values()), len(tensors), len(gc.get_objects()))
