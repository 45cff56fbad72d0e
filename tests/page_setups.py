"""What each page takes for granted: the names that its code starts with, besides the libraries.

A page whose sections are of different libraries has a setup for each of them.
"""

import importlib
import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Names = dict[str, Any]


def library(name: str) -> Any:
    """A library that may be missing, or one of the examples."""
    return importlib.import_module(name)


def training() -> Names:
    """A small Llama, and a batch with its labels."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=512,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        use_cache=False,
    )
    ids = torch.randint(0, 512, (2, 64))
    batch = {"input_ids": ids, "labels": ids}
    return {"model": LlamaForCausalLM(config), "batch": batch}


def head() -> Names:
    """Hidden states, the layer behind them, and labels."""
    hidden = torch.randn(64, 16, requires_grad=True)
    return {"hidden": hidden, "head": nn.Linear(16, 512), "labels": torch.randint(0, 512, (64,))}


def attention() -> Names:
    """Four heads of queries, two of keys, spans and sinks."""
    q, k, v = torch.randn(1, 4, 16, 8), torch.randn(1, 2, 16, 8), torch.randn(1, 2, 16, 8)
    return {"q": q, "k": k, "v": v, "spans": [4, 0], "sinks": [1, 0], "scale": 1 / math.sqrt(8)}


def blocks() -> Names:
    """A model of two blocks."""
    model = nn.Module()
    model.layers = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.GELU()) for _ in range(2))
    return {"model": model}


def sharded() -> Names:
    """The same, in a group of one process."""
    import torch.distributed as dist
    from torch.distributed.fsdp import fully_shard

    store: Any = getattr(dist, "HashStore")()  # noqa: B009, not in its stubs
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    return blocks() | {"fully_shard": fully_shard}


def trainer() -> Names:
    """What Hugging Face's Trainer is made of."""
    import tempfile

    from transformers import Trainer, TrainingArguments

    folder = tempfile.mkdtemp()
    arguments = TrainingArguments(folder, max_steps=1, report_to="none", use_cpu=True)
    data = [{"input_ids": ids, "labels": ids} for ids in torch.randint(0, 512, (8, 32))]
    return training() | {
        "Trainer": Trainer,
        "arguments": arguments,
        "data": data,
        "loss": lambda outputs, labels, num_items_in_batch=None: outputs.logits.sum(),
    }


def sft_trainer() -> Names:
    """What TRL's SFTTrainer is made of; its tokenizer is that of the example."""
    trl, datasets = library("trl"), library("datasets")
    tokenizer = library("trl_sft").characters()
    ids = torch.randint(0, 80, (8, 32)).tolist()
    return training() | {
        "SFTTrainer": partial(trl.SFTTrainer, processing_class=tokenizer),
        "config": trl.SFTConfig(report_to="none", use_cpu=True, bf16=False),
        "data": datasets.Dataset.from_dict({"input_ids": ids}),
    }


def accelerator() -> Names:
    """An accelerator, and what it prepares."""
    names = training()
    return names | {
        "accelerator": library("accelerate").Accelerator(cpu=True),
        "optimizer": torch.optim.AdamW(names["model"].parameters()),
        "data": torch.utils.data.DataLoader(torch.zeros(4, 8)),  # type: ignore[arg-type]
    }


def adapters() -> Names:
    """A model, and how PEFT changes it."""
    peft = library("peft")
    return training() | {"LoraConfig": peft.LoraConfig, "get_peft_model": peft.get_peft_model}


def lightning() -> Names:
    """The library, and how to make a model."""
    return {"lightning": library("lightning"), "make_model": lambda: training()["model"]}


def loop() -> Names:
    """A loss of a model and a batch, of which several make a step."""

    def loss_of(model: nn.Module, batch: Tensor) -> Tensor:
        return F.mse_loss(model(batch), batch)

    model = nn.Sequential(nn.Linear(8, 8), nn.GELU())
    return {"loss_of": loss_of, "model": model, "batch": torch.randn(4, 8), "accumulated": 2}


def pipeline() -> Names:
    """A pipeline of diffusers, whose images need no prompt."""
    return {"pipeline": _Prompted(library("diffusers_pipeline").pipeline()), "prompt": 1}


class _Prompted:
    """A pipeline with few steps."""

    def __init__(self, made: Any) -> None:
        self.made, self.unet = made, made.unet

    def __call__(self, prompt: Any) -> Any:
        self.made.unet = self.unet
        return self.made(prompt, num_inference_steps=2, output_type="np")


def classifier() -> Names:
    """Losses of PyTorch; a model of timm is a module like any other."""
    return {"F": F}


def exported() -> Names:
    """A model and its input."""
    return {"model": nn.Linear(8, 8).eval(), "x": torch.randn(4, 8)}


SETUPS: Mapping[str, Callable[[], Names]] = {
    "README.md": training,
    "docs/index.md": training,
    "docs/banded-attention.md": attention,
    "docs/budget.md": blocks,
    "docs/chunked-losses.md": head,
    "docs/debugging.md": training,
    "docs/distributed.md": sharded,
    "docs/fused-rows.md": training,
    "docs/integrations.md#hugging-face-trainer": trainer,
    "docs/integrations.md#trl": sft_trainer,
    "docs/integrations.md#accelerate": accelerator,
    "docs/integrations.md#peft": adapters,
    "docs/integrations.md#pytorch-lightning": lightning,
    "docs/integrations.md#torchtitan-and-loops-of-your-own": loop,
    "docs/integrations.md#diffusers": pipeline,
    "docs/integrations.md#timm": classifier,
    "docs/integrations.md#torchexport-and-aotinductor": exported,
}
