"""Which of several ways runs fastest on the device at hand: measured once, and remembered.

Answers are kept beside Inductor's own caches, per product, size and version. Ranks that measure
at the same time may come to different answers; what they choose between communicates nothing, so
no rank waits for another because of it.
"""

import hashlib
import logging
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from memopt._torch import cache_dir, inductor_config
from memopt._versions import __version__
from memopt.stored import keep, kept

log = logging.getLogger(__name__)

_RUNS = 3
_LEAST_SECONDS = 0.005  # of a run of several calls: a GPU is busy while the next ones are launched

Ways = Mapping[str, Callable[[], float]]


def best_seconds(call: Callable[[], Any], device: torch.device) -> float:
    """Of one call, by the best of three runs of as many calls as a clock needs."""

    def average(calls: int) -> float:
        start = time.perf_counter()
        for _ in range(calls):
            call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return (time.perf_counter() - start) / calls

    average(1)  # compiles
    calls = 1 + int(_LEAST_SECONDS / average(1))
    return min(average(calls) for _ in range(_RUNS))


def fastest(question: tuple[Any, ...], ways: Ways, device: torch.device) -> str:
    """The name of the way that takes the fewest seconds; the first of several.

    Args:
        question: all that the answer depends on, but the device and the versions.
        ways: by name, what gives its seconds; the first is taken where there is no memory to
            find out.
        device: where they run.
    """
    known = seconds_of(question, ways, device)
    return min(known, key=known.__getitem__, default=next(iter(ways)))


def seconds_of(question: tuple[Any, ...], ways: Ways, device: torch.device) -> dict[str, float]:
    """The seconds of each way, as ``fastest`` compares them; none without the memory for it."""
    path = _path(question, device)
    known = _recall(path, ways)
    if known is None:
        try:
            known = {name: way() for name, way in ways.items()}
        except torch.OutOfMemoryError:
            return {}
        log.debug("seconds for %s: %s", question, known)
        if not inductor_config.force_disable_caches:
            keep(path, known)
    return known


def _recall(path: Path, ways: Ways) -> dict[str, float] | None:
    """What an earlier process measured, if the file can be read."""
    body = kept(path)
    return body if body is not None and body.keys() == ways.keys() else None


def _path(question: tuple[Any, ...], device: torch.device) -> Path:
    product = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    facts = __version__, torch.__version__, product, *question
    digest = hashlib.sha256(repr(facts).encode()).hexdigest()
    return Path(cache_dir()) / "memopt" / f"{digest}.json"
