"""Every causal language model of `transformers`, small, with random weights and offline.

``CAUSAL_LMS`` lists them; ``python -m bench.zoo.families`` says which of them train in eager.
"""

import argparse
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from rich.console import Console
from rich.table import Column, Table
from torch import Generator, Tensor, nn
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from bench.zoo.model import Inputs, step
from bench.zoo.shrink import FIRST_WORD, shrink

BATCH, LENGTH, VOCAB = 2, 16, 512
UNLABELLED = 3  # tokens at the start of each sequence that have no label
IGNORED = -100

# How the reason of `trains_in_eager` starts where there is no module at all.
NOT_BUILT = "not built: "

_INDEXER = {
    "indexer_n_heads": 2,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 16,
    "indexer_budget": 8,
    "indexer_compress_ratio": 4,
}
_ASSISTED = {"text_config": {"hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0}}

# What the rules of `shrink` do not reach: defaults that make no valid model, or that leave out a
# kind of layer that the released models have.
OVERRIDES: Mapping[str, Mapping[str, Any]] = {
    "bamba": {"attn_layer_indices": [1]},
    "cohere_compass_text": {
        "rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4}}
    },
    "dbrx": {"attn_config": {"rope_theta": 1e4, "clip_qkv": 8.0}},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "deepseek_v4": {
        "compress_rates": {"compressed_sparse_attention": 4, "heavily_compressed_attention": 8}
    },
    "dory": {
        "n_input_layers": 1,
        "n_recurrent_layers": 1,
        "n_output_layers": 1,
        "num_hidden_layers": 3,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    },
    "dots1": {
        "n_routed_experts": 4,
        "n_shared_experts": 1,
        "num_experts_per_tok": 2,
        "n_group": 1,
        "topk_group": 1,
    },
    "dots3_note": {"head_dim": 32},
    "dots3_note_text": {"head_dim": 32},
    "gemma3n_text": {"num_kv_shared_layers": 1},
    "gemma4_assistant": _ASSISTED,
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"]},
    "hunyuan_v1_moe": {"num_experts": 4, "moe_topk": 2},
    "inkling2_loop_text": {
        "loop_layer_index_start": 1,
        "loop_layer_index_end": 2,
        "n_layers_per_attn_res_block": 1,
    },
    "inkling2_text": {"n_layers_per_attn_res_block": 1},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "laguna": {"num_attention_heads_per_layer": None},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "longcat_flash": {"head_dim": 8},
    "mamba2": {"num_heads": 8},
    "minimax_m3_vl_text": {
        "layer_types": ["full_attention", "minimax_m3_sparse"],
        "index_block_size": 4,
        "index_topk_blocks": 2,
    },
    "qwen4_exp": _INDEXER,
    "qwen4_exp_text": _INDEXER,
    "recurrent_gemma": {"num_hidden_layers": 3},
    "reformer": {
        "axial_pos_shape": [4, LENGTH // 4],
        "axial_pos_embds_dim": [32, 32],
        "hash_seed": 0,
    },
    "xmod": {"default_language": "en_XX"},
    "zamba": {
        "layers_block_type": ["linear_attention", "hybrid", "hybrid"],
        "num_hidden_layers": 3,
        "attention_hidden_size": 128,
        "attention_head_dim": 32,
    },
}


@dataclass(frozen=True, slots=True)
class Family:
    """One model type of the library.

    Attributes:
        name: the library's name of the type, such as ``"llama"``.
        class_name: the class that the library trains as a causal language model of that type;
            some types share one.
    """

    name: str
    class_name: str

    def config(self, vocab: int = VOCAB) -> Any:
        """The small configuration; a composite one gives the part that the class takes."""
        whole = CONFIG_MAPPING[self.name]
        taken = getattr(transformers, self.class_name).config_class
        config_class = taken if taken in whole.sub_configs.values() else whole
        return shrink(config_class, vocab, OVERRIDES.get(self.name, {}))

    def make(self, seed: int = 0, vocab: int = VOCAB) -> tuple[nn.Module, Inputs]:
        """The module in training mode, without dropout, and the arguments of one call.

        Equal arguments give equal numbers. The first tokens of each sequence have no label.
        """
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            module = getattr(transformers, self.class_name)(self.config(vocab))
        # The library guesses this from the name of the class; where it fails, it would warn, which
        # breaks a compiled graph, and then take this one.
        module.loss_type = module.loss_type or "ForCausalLM"
        inputs = _INPUTS.get(self.name, text_inputs)
        return module.train(), inputs(vocab, Generator().manual_seed(seed + 1))


def text_inputs(vocab: int, generator: Generator) -> Inputs:
    """Token ids `(batch, length)`, none of them special, that are their own labels."""
    ids = torch.randint(FIRST_WORD, vocab, (BATCH, LENGTH), generator=generator)
    return {"input_ids": ids, "labels": _labels(ids)}


def _image_and_text(vocab: int, generator: Generator) -> Inputs:
    """GIT cuts the logits of an image off, and so it needs one."""
    pixels = torch.randn(BATCH, 3, 32, 32, generator=generator)
    return {"pixel_values": pixels, **text_inputs(vocab, generator)}


def _codebooks(vocab: int, generator: Generator) -> Inputs:
    """MusicGen: ids `(batch * codebooks, length)`, labels `(batch, length, codebooks)`."""
    codes = torch.randint(FIRST_WORD, vocab, (BATCH, 4, LENGTH), generator=generator)
    return {"input_ids": codes.flatten(0, 1), "labels": _labels(codes.transpose(1, 2))}


def _labels(ids: Tensor) -> Tensor:
    labels = ids.clone()
    labels[:, :UNLABELLED] = IGNORED
    return labels


_INPUTS: Mapping[str, Callable[[int, Generator], Inputs]] = {
    "git": _image_and_text,
    "musicgen": _codebooks,
    "musicgen_melody": _codebooks,
}

CAUSAL_LMS: tuple[Family, ...] = tuple(
    Family(name, class_name)
    for name, class_name in sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items())
)


def trains_in_eager(family: Family) -> str | None:
    """Why one step of a family fails, or None where the loss is finite.

    Any error is a reason here: a missing package, a download, a device, a bug of the library.
    """
    try:
        module, inputs = family.make()
    except Exception as error:
        return NOT_BUILT + _reason(error)
    try:
        loss = step(module, inputs)
    except Exception as error:
        return _reason(error)
    return None if loss.isfinite() else f"the loss is {loss.item()}"


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def main() -> int:
    """Print which families train in eager."""
    parser = argparse.ArgumentParser(prog="python -m bench.zoo.families", description=__doc__)
    parser.add_argument("names", nargs="*", help="model types; default: all")
    names = parser.parse_args().names
    unknown = set(names) - {family.name for family in CAUSAL_LMS}
    if unknown:
        parser.error(f"no family {sorted(unknown)[0]!r}")
    # It warns about the defaults of its own configurations.
    transformers.logging.set_verbosity_error()

    table = Table(
        Column("family", no_wrap=True), Column("class", no_wrap=True), "trains in eager", "seconds"
    )
    reasons = []
    for family in CAUSAL_LMS:
        if names and family.name not in names:
            continue
        start = time.perf_counter()
        reasons.append(reason := trains_in_eager(family))
        seconds = time.perf_counter() - start
        table.add_row(family.name, family.class_name, reason or "yes", f"{seconds:.2f}")
    Console().print(table)
    built = sum(not (reason or "").startswith(NOT_BUILT) for reason in reasons)
    print(f"{len(reasons)} families, {built} built, {reasons.count(None)} train in eager")
    return 0


if __name__ == "__main__":
    sys.exit(main())
