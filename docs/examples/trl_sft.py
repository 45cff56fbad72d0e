"""TRL's SFTTrainer: compile the model in place once the trainer has set it up.

``python docs/examples/trl_sft.py``.
"""

import tempfile
from typing import Any

from datasets import Dataset
from shared import ALPHABET, crops, llama
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer

import memopt


def characters() -> PreTrainedTokenizerFast:
    """A tokeniser with one token for each character of the book."""
    words = {character: index for index, character in enumerate(ALPHABET)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token=" "))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=" ", eos_token="\n")


def train(options: dict[str, Any] | None = None, steps: int = 4, **settings: Any) -> list[float]:
    """The loss of every step.

    Args:
        options: memopt's; None to train without it.
        steps: optimiser steps.
        **settings: further ones of the ``SFTConfig``.
    """
    model = llama(vocabulary=256, layers=4)  # the head is the trainer's own affair
    with tempfile.TemporaryDirectory() as folder:
        config = SFTConfig(
            folder,
            max_steps=steps,
            per_device_train_batch_size=4,
            logging_steps=1,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,  # the plan decides what is recomputed
            **settings,
        )
        data = Dataset.from_dict({"input_ids": crops(32).tolist()})
        trainer = SFTTrainer(model, config, train_dataset=data, processing_class=characters())
        if options is not None:
            memopt.optimize(model, **options)
        trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


if __name__ == "__main__":
    print("without memopt:", train())
    print("with memopt:   ", train({"memory_budget": "min"}))
