"""Hugging Face's Trainer: compile the model in place, or the Trainer's own loss with it.

The losses of four steps, without memopt and with it: ``python docs/examples/hf_trainer.py``.
"""

import tempfile
from collections.abc import Callable
from typing import Any

from shared import crops, llama
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import Trainer, TrainingArguments

import memopt


def train(
    options: dict[str, Any] | None = None,
    loss: Callable[..., Tensor] | None = None,
    steps: int = 4,
    **arguments: Any,
) -> list[float]:
    """The loss of every step.

    Args:
        options: memopt's; None to train without it.
        loss: Trainer's ``compute_loss_func``.
        steps: optimiser steps.
        **arguments: further ``TrainingArguments``.
    """
    model = llama()
    data = [{"input_ids": ids, "labels": ids} for ids in crops(32)]
    with tempfile.TemporaryDirectory() as folder:
        settings = TrainingArguments(
            folder,
            max_steps=steps,
            per_device_train_batch_size=4,
            logging_steps=1,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
            use_cpu=True,
            **arguments,
        )
        trainer = Trainer(model, settings, train_dataset=data, compute_loss_func=loss)
        inside = loss is None and not settings.label_smoothing_factor
        if options is not None and inside:
            memopt.optimize(model, **options)
        elif options is not None:  # the loss is computed outside the model: compile both
            trainer.compute_loss = memopt.optimize(trainer.compute_loss, **options)
        trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def token_mean(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
    """Cross-entropy over the tokens of the whole accumulated batch."""
    logits, targets = outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    return cross_entropy(logits.float(), targets, reduction="sum") / num_items_in_batch


if __name__ == "__main__":
    print("without memopt:", train())
    print("with memopt:   ", train({"memory_budget": 0.8}))
    print("its own loss:  ", train({"memory_budget": 0.8}, token_mean))
