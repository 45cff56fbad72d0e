"""PEFT: a LoRA adapter on every linear layer, then compiled in place.

``python docs/examples/peft_lora.py``.
"""

from typing import Any

from peft import LoraConfig, get_peft_model
from shared import crops, llama
from torch.optim import AdamW

import memopt


def train(options: dict[str, Any] | None = None, steps: int = 4, **settings: Any) -> list[float]:
    """The loss of every step.

    Args:
        options: memopt's; None to train without it.
        steps: optimiser steps.
        **settings: further ones of the ``LoraConfig``.
    """
    model = get_peft_model(llama(), LoraConfig(**{"target_modules": "all-linear", **settings}))
    if options is not None:
        memopt.optimize(model, **options)
    optimiser = AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    losses = []
    for ids in crops(4 * steps).split(4):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        losses.append(loss.item())
    return losses


if __name__ == "__main__":
    print("without memopt:", train())
    print("with memopt:   ", train({"memory_budget": 0.8}))
