"""Accelerate: compile in place before ``prepare``.

Its ``dynamo_backend`` is a closed list, which refuses the name "memopt".
``python docs/examples/accelerate_loop.py``.
"""

from typing import Any

from accelerate import Accelerator
from shared import crops, llama
from torch.optim import AdamW
from torch.utils.data import DataLoader

import memopt


def train(options: dict[str, Any] | None = None, steps: int = 4, **settings: Any) -> list[float]:
    """The loss of every step.

    Args:
        options: memopt's; None to train without it.
        steps: micro-batches.
        **settings: of the ``Accelerator``.
    """
    accelerator = Accelerator(cpu=True, **settings)
    model = llama()
    if options is not None:
        memopt.optimize(model, **options)
    optimiser = AdamW(model.parameters(), lr=1e-3)
    data = DataLoader(crops(4 * steps), batch_size=4)
    model, optimiser, data = accelerator.prepare(model, optimiser, data)
    losses = []
    for ids in data:
        with accelerator.accumulate(model):
            loss = model(input_ids=ids, labels=ids).loss
            accelerator.backward(loss)
            optimiser.step()
            optimiser.zero_grad()
            losses.append(loss.item())
    return losses


if __name__ == "__main__":
    print("without memopt:", train())
    print("with memopt:   ", train({"memory_budget": 0.8}))
