"""How a model is run on a batch while it is profiled, and what is kept of the batches."""

import hashlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from memopt._torch import pytree
from memopt.errors import ConfigError

Loss = Callable[[Any, Any], Tensor]
"""Of a model and a batch."""


@contextmanager
def evaluated(model: nn.Module) -> Iterator[None]:
    """Eval mode, and back to each module's own."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


def loss_of(model: Any, batch: Any) -> Tensor:
    """What a model returns as its loss: ``.loss``, the first of a tuple, or a lone tensor.

    Raises:
        ConfigError: that is no scalar.
    """
    if isinstance(batch, Mapping):
        out = model(**batch)
    else:
        out = model(*batch) if isinstance(batch, tuple | list) else model(batch)
    found: Any = getattr(out, "loss", None)
    return scalar(found if found is not None else out[0] if isinstance(out, tuple) else out)


def scalar(value: Any) -> Tensor:
    """A loss that is one.

    Raises:
        ConfigError: it is none.
    """
    if not isinstance(value, Tensor) or value.dim():
        seen = f"of shape {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)
        raise ConfigError(
            f"a scalar loss is needed, and what was found is {seen}: give labels in the batches, "
            "or loss=lambda model, batch: ..."
        )
    return value


def data_hash(batches: list[Any]) -> str:
    """Of all numbers in all tensors of the batches."""
    digest = hashlib.sha256()
    for leaf in pytree.tree_leaves(batches):
        if isinstance(leaf, Tensor):
            digest.update(f"{leaf.dtype} {tuple(leaf.shape)}".encode())
            numbers = leaf.detach().cpu().contiguous().flatten().view(torch.uint8)
            digest.update(numbers.numpy().tobytes())
        else:
            digest.update(repr(leaf).encode())
    return digest.hexdigest()[:16]
