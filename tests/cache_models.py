"""Small language models of transformers, from configs, and what they generate."""

from collections.abc import Callable
from typing import Any

import torch
import transformers as hf

from memopt import cache as caches
from memopt.cache import HeadCache

Tensor = torch.Tensor
HEADS, LAYERS, WIDTH = 2, 2, 8
FAMILIES: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "llama": (hf.LlamaConfig, hf.LlamaForCausalLM, {}),
    "qwen2": (hf.Qwen2Config, hf.Qwen2ForCausalLM, {}),
    "qwen3": (hf.Qwen3Config, hf.Qwen3ForCausalLM, {}),
    "mistral": (hf.MistralConfig, hf.MistralForCausalLM, {"sliding_window": 9}),
    "phi3": (hf.Phi3Config, hf.Phi3ForCausalLM, {}),
    "olmo2": (hf.Olmo2Config, hf.Olmo2ForCausalLM, {}),
    "gemma3": (
        hf.Gemma3TextConfig,
        hf.Gemma3ForCausalLM,
        {"sliding_window": 9, "layer_types": ["sliding_attention", "full_attention"]},
    ),
    "gpt2": (hf.GPT2Config, hf.GPT2LMHeadModel, {"n_embd": 16, "n_layer": 2, "n_head": 2}),
}
WAYS: dict[str, dict[str, Any]] = {
    "greedy": {"do_sample": False},
    "sampled": {"do_sample": True},
    "beams": {"do_sample": False, "num_beams": 3},
}


def tiny(family: str = "llama", layers: int = LAYERS) -> Any:
    """A model with two heads of keys, each for two of queries."""
    config, model, extra = FAMILIES[family]
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": layers,
        "num_attention_heads": 2 * HEADS,
        "num_key_value_heads": HEADS,
        "head_dim": WIDTH,
        "max_position_embeddings": 256,
    }
    common = {"vocab_size": 96, "pad_token_id": 0, "bos_token_id": None, "eos_token_id": None}
    torch.manual_seed(0)
    return model(config(**common, **(extra if family == "gpt2" else {**sizes, **extra}))).eval()


def prompts(n: int = 20, padding: tuple[int, ...] = (7, 0)) -> dict[str, Tensor]:
    """Token ids and their mask, with so much padding on the left of each."""
    mask = (torch.arange(n) >= torch.tensor(padding)[:, None]).long()
    ids = torch.randint(1, 96, mask.shape)
    return {"input_ids": ids * mask, "attention_mask": mask}


def generated(model: Any, inputs: dict[str, Tensor], way: str = "greedy", **others: Any) -> Tensor:
    """Token ids, from the same seed each time."""
    torch.manual_seed(1)
    ids: Tensor = model.generate(**inputs, max_new_tokens=12, **WAYS[way], **others)
    return ids


def by_transformers(
    model: Any, inputs: dict[str, Tensor], way: str = "greedy", **others: Any
) -> Tensor:
    """The same with transformers' own cache and attention."""
    model.set_attn_implementation("sdpa")
    ids = generated(model, inputs, way, cache=hf.DynamicCache(config=model.config), **others)
    caches.prepare(model)
    return ids


EXACT: dict[str, Callable[[Any], HeadCache]] = {
    "spans": lambda config: caches.HeadSpanCache(config, [[None] * HEADS] * LAYERS, 64),
    "host": lambda config: caches.HostCache(config, 64),
}
