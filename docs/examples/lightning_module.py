"""PyTorch Lightning: compile the model that the LightningModule holds, in ``configure_model``.

``python docs/examples/lightning_module.py``.
"""

from typing import Any

import lightning
from shared import crops, llama
from torch import Tensor, nn
from torch.optim import AdamW
from torch.utils.data import DataLoader

import memopt


class LanguageModel(lightning.LightningModule):
    """A Llama; ``losses`` has the loss of every step."""

    def __init__(self, options: dict[str, Any] | None) -> None:
        super().__init__()
        self.options = options
        self.model: nn.Module | None = None
        self.losses: list[float] = []

    def configure_model(self) -> None:
        """Make the model where the Trainer wants it; called more than once."""
        if self.model is None:
            self.model = llama()
            if self.options is not None:
                memopt.optimize(self.model, **self.options)

    def training_step(self, ids: Tensor, index: int) -> Tensor:
        """The loss of one batch."""
        assert self.model is not None
        loss: Tensor = self.model(input_ids=ids, labels=ids).loss
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self) -> AdamW:
        """One optimiser for everything."""
        return AdamW(self.parameters(), lr=1e-3)


def train(options: dict[str, Any] | None = None, steps: int = 4, **settings: Any) -> list[float]:
    """The loss of every step.

    Args:
        options: memopt's; None to train without it.
        steps: batches.
        **settings: further ones of the ``Trainer``.
    """
    module = LanguageModel(options)
    trainer = lightning.Trainer(
        accelerator="cpu",
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **settings,
    )
    trainer.fit(module, DataLoader(crops(4 * steps), batch_size=4))
    return module.losses


if __name__ == "__main__":
    print("without memopt:", train())
    print("with memopt:   ", train({"memory_budget": 0.8}))
