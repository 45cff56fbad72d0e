"""Small language models in plain PyTorch, and one that uses a single block many times."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.zoo.model import BlockModel, Inputs, Recipe


class Block(nn.Module):
    """A Llama-like block without rotary embeddings.

    Shapes: `x_BTH` batch, tokens, hidden; heads split `H` into `(heads, H // heads)`.
    """

    def __init__(self, hidden: int, inter: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.attention_norm = nn.RMSNorm(hidden)
        self.query = nn.Linear(hidden, hidden, bias=False)
        self.key = nn.Linear(hidden, hidden, bias=False)
        self.value = nn.Linear(hidden, hidden, bias=False)
        self.out = nn.Linear(hidden, hidden, bias=False)
        self.ffn_norm = nn.RMSNorm(hidden)
        self.gate = nn.Linear(hidden, inter, bias=False)
        self.up = nn.Linear(hidden, inter, bias=False)
        self.down = nn.Linear(inter, hidden, bias=False)

    def _attention(self, x_BTH: Tensor) -> Tensor:  # noqa: N803
        q, k, v = (
            layer(x_BTH).unflatten(2, (self.heads, -1)).transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        )
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(mixed.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]

    def forward(self, x_BTH: Tensor) -> Tensor:  # noqa: N803
        attended = self._attention(self.attention_norm(x_BTH))
        x_BTH = x_BTH + F.dropout(attended, self.dropout, self.training)  # noqa: N806
        y_BTH = self.ffn_norm(x_BTH)  # noqa: N806
        ffn_BTH: Tensor = self.down(F.silu(self.gate(y_BTH)) * self.up(y_BTH))  # noqa: N806
        return x_BTH + ffn_BTH


class LanguageModel(BlockModel):
    """Embedding, blocks, norm, head; returns the mean cross-entropy alone."""

    def __init__(
        self,
        layers: int,
        hidden: int,
        inter: int,
        vocab: int,
        heads: int,
        *,
        dropout: float = 0.0,
        rounds: int = 1,
    ) -> None:
        super().__init__()
        self.rounds = rounds
        self.embedding = nn.Embedding(vocab, hidden)
        self.blocks = nn.ModuleList(Block(hidden, inter, heads, dropout) for _ in range(layers))
        self.norm = nn.RMSNorm(hidden)
        self.head = nn.Linear(hidden, vocab, bias=False)

    def forward(self, ids: Tensor, targets: Tensor) -> Tensor:
        x = self.embedding(ids)
        for _ in range(self.rounds):
            for block in self.blocks:
                x = self.run_block(block, x)
        logits = self.head(self.norm(x))
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def language_model(
    *shape: int, batch: int, length: int, dropout: float = 0.0, rounds: int = 1
) -> Recipe:
    """A `LanguageModel`; ``shape`` is layers, hidden, intermediate, vocabulary, heads.

    ``rounds`` above one runs the same blocks again: shared weights, gradients that accumulate.
    """

    def inputs(seed: int) -> Inputs:
        generator = torch.Generator().manual_seed(seed)
        ids = torch.randint(0, shape[3], (2, batch, length), generator=generator)
        return {"ids": ids[0], "targets": ids[1]}

    layers, hidden, inter, vocab, heads = shape
    return Recipe(
        lambda: LanguageModel(layers, hidden, inter, vocab, heads, dropout=dropout, rounds=rounds),
        inputs,
    )
