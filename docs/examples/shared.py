"""What the examples share: a small Llama and real text. Nothing is downloaded."""

from pathlib import Path

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

BOOK = (Path(__file__).parents[2] / "bench" / "data" / "alice.txt").read_text(encoding="utf-8")
ALPHABET = sorted(set(BOOK))
VOCABULARY = 4096  # as of a small tokeniser; the text needs the first few only


def crops(count: int, length: int = 64) -> Tensor:
    """The book's first characters as int64 ids `(count, length)`."""
    ids = {character: index for index, character in enumerate(ALPHABET)}
    return torch.tensor([ids[c] for c in BOOK[: count * length]]).view(count, length)


def llama(vocabulary: int = VOCABULARY, layers: int = 2) -> LlamaForCausalLM:
    """Layers of 64 features, the same random weights at every call."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        use_cache=False,
    )
    return LlamaForCausalLM(config)
