"""Models that do not fit here, and the options that `bench.plans` plans them with."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from bench.zoo.model import Recipe
from bench.zoo.tuning import LowRank, adapt
from bench.zoo.vision import resnet
from bench.zoo.vision_library import efficientnet, mobilenet_v2, regnet
from memopt.passes import JOINT, POST_GRAD, PRE_GRAD

GB = 10**9
Made = tuple[nn.Module, dict[str, Tensor]]
Options = Mapping[str, Any]
# With torch's own partition of the graph.
STOCK: Options = {
    "memory_budget": None,
    "passes": {pass_.name: False for pass_ in (*PRE_GRAD, *JOINT, *POST_GRAD)},
}


@dataclass(frozen=True)
class PlanCase:
    """A model, and the options to plan it with, by what the results call them."""

    make: Callable[[], Made]
    options: Mapping[str, Options]


def llama3_8b() -> Made:
    """Llama-3-8B in bfloat16, all of it trained, on one sequence of 8192 tokens."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.set_default_dtype(torch.bfloat16)
    try:
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=128256, hidden_size=4096, intermediate_size=14336,
                num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8,
                max_position_embeddings=8192, use_cache=False, attn_implementation="sdpa",
            )
        )  # fmt: skip
    finally:
        torch.set_default_dtype(torch.float32)
    ids = torch.zeros(1, 8192, dtype=torch.long)
    return model.train(), {"input_ids": ids, "labels": ids}


def vit_b_lora() -> Made:
    """ViT-B/16 with LoRA at queries and values, 32 images."""
    from transformers import ViTConfig, ViTForImageClassification

    model = ViTForImageClassification(ViTConfig()).train()
    adapt(model, LowRank, "query", "value", "q_proj", "v_proj")
    return model, _images("pixel_values", batch=32)


def resnet50_frozen() -> Made:
    """ResNet-50, nothing trained, with a gradient to its input; 32 images."""
    model, inputs = resnet50(norms_in_eval=True)
    inputs["images"].requires_grad_(True)
    return model.requires_grad_(False), inputs


def resnet50(*, norms_in_eval: bool) -> Made:
    """ResNet-50, all of it trained; 32 images."""
    return made(resnet((3, 4, 6, 3), 64, frozen=norms_in_eval, batch=32, side=224))


def made(recipe: Recipe) -> Made:
    """All of a model trained, norms in eval mode."""
    return recipe.build(), recipe.inputs(0)


def _images(name: str, *, batch: int) -> dict[str, Tensor]:
    labels = torch.zeros(batch, dtype=torch.long)
    return {name: torch.randn(batch, 3, 224, 224), "labels": labels}


_REGNET_Y_040 = regnet((2, 6, 12, 2), (128, 192, 512, 1088), 64, batch=16, side=224)

PLANS = {
    "llama3_8b": PlanCase(
        llama3_8b,
        {
            "recompute": {"memory_budget": 17 * GB},
            "recompute, offload": {"memory_budget": 17 * GB, "passes": {"offload": True}},
        },
    ),
    "vit_b_lora": PlanCase(vit_b_lora, {"half": {"memory_budget": 0.5}}),
    "resnet50_frozen": PlanCase(
        resnet50_frozen,
        {"nine tenths": {"memory_budget": 0.9}, "min": {"memory_budget": "min"}},
    ),
    "resnet50_norms_in_eval": PlanCase(
        partial(resnet50, norms_in_eval=True), {"0.95": {"memory_budget": 0.95}}
    ),
    "resnet50": PlanCase(partial(resnet50, norms_in_eval=False), {"0.6": {"memory_budget": 0.6}}),
    "mobilenet_v2": PlanCase(
        partial(made, mobilenet_v2(batch=16, side=224)), {"0.95": {"memory_budget": 0.95}}
    ),
    "efficientnet_b0": PlanCase(
        partial(made, efficientnet(batch=16, side=224)), {"0.55": {"memory_budget": 0.55}}
    ),
    "regnet_y_040": PlanCase(partial(made, _REGNET_Y_040), {"0.8": {"memory_budget": 0.8}}),
}
