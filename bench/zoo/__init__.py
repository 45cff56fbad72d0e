"""The model zoo that tests and benchmarks share.

``MODELS`` maps a name to a `Model`; ``MODELS["llama"].make("tiny")`` builds one on the spot from
a configuration, with random weights and random inputs that depend on the seed alone.
"""

from bench.zoo.model import (
    FusedHead,
    Inputs,
    LossOnly,
    Model,
    Recipe,
    checkpoint_blocks,
    loss_of,
    step,
)
from bench.zoo.table import MODELS

__all__ = [
    "MODELS",
    "FusedHead",
    "Inputs",
    "LossOnly",
    "Model",
    "Recipe",
    "checkpoint_blocks",
    "loss_of",
    "step",
]
