"""Chunks of logits, or none at all: whichever a GPU runs faster, measured and remembered.

Which one wins depends on how a GPU's matrix products, its memory and its compiler get on at these
sizes, so both are timed, once per size and dtype, and the answer is kept beside Inductor's own
caches. Ranks that measure at the same time may come to different answers; the operator
communicates nothing, so no rank waits for another because of it.
"""

import hashlib
import json
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from memopt._torch import cache_dir, disable_modes, inductor_config, write_atomic
from memopt._versions import __version__
from memopt.kernels.blocks import default_chunk_rows
from memopt.kernels.linear_cross_entropy import REDUCED

log = logging.getLogger(__name__)

_RUNS = 3
_FIELDS = ("chunked_seconds", "cut_seconds")


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
        runs = []
        for _ in range(1 + _RUNS):  # the first one compiles
            start = time.perf_counter()
            REDUCED(*shared, chunk_rows, [True, True, False], True)
            torch.cuda.synchronize(size.device)
            runs.append(time.perf_counter() - start)
    return min(runs[1:])


def fastest_chunk_rows(size: Size, timer: Callable[[Size, int], float] = seconds) -> int:
    """Rows of a chunk, or 0 for no logits in memory, whichever runs faster.

    Args:
        size: of a problem that can do without logits in memory.
        timer: gives the seconds for so many rows of a chunk.

    Returns:
        0 or ``default_chunk_rows``; the latter where there is no memory to find out.
    """
    usual = default_chunk_rows(size.rows, size.classes, size.device)
    path = _path(size, usual)
    known = _recall(path)
    if known is None:
        try:
            known = timer(size, usual), timer(size, 0)
        except torch.OutOfMemoryError:
            return usual
        log.debug("seconds by chunks and without: %s for %s", known, size)
        if not inductor_config.force_disable_caches:
            body = dict(zip(_FIELDS, known, strict=True))
            write_atomic(str(path), json.dumps(body), make_dirs=True)
    chunked, cut = known
    return 0 if cut < chunked else usual


def _recall(path: Path) -> tuple[float, float] | None:
    """What an earlier process measured, if the file can be read."""
    try:
        body = json.loads(path.read_text(encoding="utf-8"))
        chunked, cut = (float(body[name]) for name in _FIELDS)
    except (OSError, ValueError, TypeError, LookupError):
        return None
    return chunked, cut


def _path(size: Size, usual: int) -> Path:
    product = torch.cuda.get_device_name(size.device)
    facts = __version__, torch.__version__, product, usual, size.rows, size.width, size.classes
    digest = hashlib.sha256(repr((*facts, str(size.dtype))).encode()).hexdigest()
    return Path(cache_dir()) / "memopt" / f"{digest}.json"
