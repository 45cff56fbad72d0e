"""Models of the `transformers` library, built from configurations: nothing is downloaded."""

from typing import Any

import torch
from torch import nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
)

from bench.zoo.model import Inputs, Recipe

COMMON: dict[str, Any] = {"attn_implementation": "sdpa"}
CAUSAL: dict[str, Any] = COMMON | {"use_cache": False, "tie_word_embeddings": False}


def _training(model: nn.Module) -> nn.Module:
    """The model in training mode, with the type that the library's own classes lose."""
    return model.train()


def token_inputs(vocab: int, batch: int, length: int, seed: int) -> Inputs:
    """Random token ids that are their own labels; the model shifts them where it must."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, vocab, (batch, length), generator=generator)
    return {"input_ids": ids, "labels": ids}


def image_inputs(names: tuple[str, str], classes: int, batch: int, side: int, seed: int) -> Inputs:
    """Random RGB images `(batch, 3, side, side)` and class labels, under the two names."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(batch, 3, side, side, generator=generator)
    labels = torch.randint(0, classes, (batch,), generator=generator)
    return {names[0]: images, names[1]: labels}


def decoder_shape(
    layers: int, vocab: int, hidden: int, inter: int, heads: int, kv_heads: int
) -> dict[str, int]:
    """The configuration keys that Llama and its relatives share."""
    return {
        "num_hidden_layers": layers,
        "vocab_size": vocab,
        "hidden_size": hidden,
        "intermediate_size": inter,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
    }


def llama(*shape: int, batch: int, length: int, **overrides: object) -> Recipe:
    """Llama; ``shape`` is layers, vocabulary, hidden, intermediate, heads, key-value heads."""
    options = CAUSAL | decoder_shape(*shape) | overrides

    def build() -> nn.Module:
        return _training(LlamaForCausalLM(LlamaConfig(**options)))

    return Recipe(build, lambda seed: token_inputs(shape[1], batch, length, seed))


def qwen3(*shape: int, batch: int, length: int) -> Recipe:
    """Qwen3: Llama with normalised queries and keys; ``shape`` as for `llama`."""
    options = CAUSAL | decoder_shape(*shape) | {"head_dim": shape[2] // shape[4]}

    def build() -> nn.Module:
        return _training(Qwen3ForCausalLM(Qwen3Config(**options)))

    return Recipe(build, lambda seed: token_inputs(shape[1], batch, length, seed))


def mixtral(*shape: int, experts: str, batch: int, length: int) -> Recipe:
    """Mixtral with four experts, two per token; ``experts`` names the implementation.

    ``"grouped_mm"`` is the library's default and goes through a custom operator on the CPU, which
    has no float64; ``"batched_mm"`` gathers weights per token and is plain aten.
    """
    options = CAUSAL | decoder_shape(*shape)
    options |= {"num_local_experts": 4, "experts_implementation": experts}

    def build() -> nn.Module:
        return _training(MixtralForCausalLM(MixtralConfig(**options)))

    return Recipe(build, lambda seed: token_inputs(shape[1], batch, length, seed))


def gpt2(layers: int, vocab: int, hidden: int, heads: int, *, batch: int, length: int) -> Recipe:
    """GPT-2 with dropout 0.1 on embeddings, attention and residuals."""

    def build() -> nn.Module:
        config = GPT2Config(
            n_layer=layers, vocab_size=vocab, n_embd=hidden, n_head=heads, n_positions=length,
            embd_pdrop=0.1, attn_pdrop=0.1, resid_pdrop=0.1, use_cache=False,
            bos_token_id=0, eos_token_id=0, **COMMON,
        )  # fmt: skip
        model = _training(GPT2LMHeadModel(config))
        # transformers guesses this from the name of the class, and fails.
        model.loss_type = "ForCausalLM"  # type: ignore[assignment]
        return model

    return Recipe(build, lambda seed: token_inputs(vocab, batch, length, seed))


def bert(layers: int, vocab: int, hidden: int, heads: int, *, batch: int, length: int) -> Recipe:
    """BERT with a masked-language head, no dropout."""

    def build() -> nn.Module:
        config = BertConfig(
            num_hidden_layers=layers, vocab_size=vocab, hidden_size=hidden,
            num_attention_heads=heads, intermediate_size=4 * hidden,
            max_position_embeddings=length, hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0, **COMMON,
        )  # fmt: skip
        return _training(BertForMaskedLM(config))

    return Recipe(build, lambda seed: token_inputs(vocab, batch, length, seed))


def t5(layers: int, vocab: int, hidden: int, heads: int, *, batch: int, length: int) -> Recipe:
    """T5, encoder and decoder of ``layers`` each, gated feed-forward, no dropout."""

    def build() -> nn.Module:
        config = T5Config(
            num_layers=layers, num_decoder_layers=layers, vocab_size=vocab, d_model=hidden,
            num_heads=heads, d_kv=hidden // heads, d_ff=2 * hidden, dropout_rate=0.0,
            feed_forward_proj="gated-gelu", decoder_start_token_id=0, use_cache=False,
        )  # fmt: skip
        return _training(T5ForConditionalGeneration(config))

    return Recipe(build, lambda seed: token_inputs(vocab, batch, length, seed))


def vit(layers: int, hidden: int, heads: int, *, batch: int, side: int, patch: int) -> Recipe:
    """ViT with a ten-class head, no dropout."""

    def build() -> nn.Module:
        config = ViTConfig(
            num_hidden_layers=layers, hidden_size=hidden, num_attention_heads=heads,
            intermediate_size=4 * hidden, image_size=side, patch_size=patch,
            hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, num_labels=10, **COMMON,
        )  # fmt: skip
        return _training(ViTForImageClassification(config))

    names = ("pixel_values", "labels")
    return Recipe(build, lambda seed: image_inputs(names, 10, batch, side, seed))
