"""Chunks of logits, or none at all: whichever a GPU runs faster, measured and remembered.

Which one wins depends on how a GPU's matrix products, its memory and its compiler get on at these
sizes, so both are timed.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from memopt._torch import disable_modes
from memopt.kernels.blocks import default_chunk_rows
from memopt.kernels.linear_cross_entropy import REDUCED
from memopt.kernels.measured import best_seconds, fastest


@dataclass(frozen=True)
class Size:
    """What the time of a head and its loss depends on.

    Attributes:
        rows: ``N``.
        width: ``H``.
        classes: ``V``.
        dtype: of hidden states and weight.
        device: a GPU.
    """

    rows: int
    width: int
    classes: int
    dtype: torch.dtype
    device: torch.device


def seconds(size: Size, chunk_rows: int) -> float:
    """Of one step of the loss with both gradients, on random numbers: the best of three.

    Raises:
        torch.OutOfMemoryError: they do not fit beside what is on the GPU.
    """
    with disable_modes(), torch.no_grad(), torch.random.fork_rng(devices=[size.device]):
        x, weight = (
            torch.randn(n, size.width, dtype=size.dtype, device=size.device)
            for n in (size.rows, size.classes)
        )
        weight *= size.width**-0.5
        target = torch.randint(size.classes, (size.rows,), device=size.device)
        shared = (x, weight, None, target, None, -100, 0.0, 1.0, 0.0)
        return best_seconds(
            lambda: REDUCED(*shared, chunk_rows, [True, True, False], True), size.device
        )


def fastest_chunk_rows(size: Size, timer: Callable[[Size, int], float] = seconds) -> int:
    """Rows of a chunk, or 0 for no logits in memory, whichever runs faster.

    Args:
        size: of a problem that can do without logits in memory.
        timer: gives the seconds for so many rows of a chunk.

    Returns:
        0 or ``default_chunk_rows``; the latter where there is no memory to find out.
    """
    usual = default_chunk_rows(size.rows, size.classes, size.device)
    ways = {"chunks": lambda: timer(size, usual), "tiles": lambda: timer(size, 0)}
    question = "chunk_rows", usual, size.rows, size.width, size.classes, str(size.dtype)
    return usual if fastest(question, ways, size.device) == "chunks" else 0
