"""timm: a classifier of its own making, loss and all in one step.

``python docs/examples/timm_classifier.py``; timm needs torchvision.
"""

from typing import Any

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import memopt


def loss_of(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of images `(B, 3, 64, 64)`."""
    return F.cross_entropy(model(images), labels)


def train(
    options: dict[str, Any] | None = None, name: str = "vit_tiny_patch16_224", steps: int = 4
) -> list[float]:
    """The loss of every step.

    Args:
        options: memopt's; None to train without it.
        name: of the model in timm.
        steps: optimiser steps.
    """
    torch.manual_seed(0)
    size = {"img_size": 64} if name.startswith("vit") else {}
    model = timm.create_model(name, num_classes=10, **size)
    loss_fn = loss_of if options is None else memopt.optimize(loss_of, **options)
    optimiser = torch.optim.SGD(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(steps):
        images, labels = torch.randn(4, 3, 64, 64), torch.randint(0, 10, (4,))
        loss = loss_fn(model, images, labels)
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        losses.append(loss.item())
    return losses


if __name__ == "__main__":
    print("without memopt:", train())
    print("with memopt:   ", train({"memory_budget": 0.5}))
