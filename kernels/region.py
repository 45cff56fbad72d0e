"""A fused region as one operator, which brings its own code: ``plain`` and Triton's.

Both are arguments, as text, and beside them which of the kernel's tilings runs. So a graph that
calls it needs nothing else: it can be printed, hashed and cached, by Inductor and by AOTAutograd,
and run by a process that never saw it being made. An operator of its own for each region would
have to be registered again before the cached code runs, and Inductor would not know it when it
looks the code up.

When a region pays: see `memopt.passes.fuse_rows`.

Source: memopt's own.
"""

import functools
import hashlib
import linecache
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from memopt.kernels.serving import processors, serves

torch.library.define(
    "memopt::region",
    "(Tensor[] inputs, SymInt[] sizes, str plain, str kernel, int tiling=0) -> Tensor[]",
)
REGION = torch.ops.memopt.region.default

_THREADS_PER_PROCESSOR = 2048


def plain(inputs: Sequence[Tensor], sizes: Sequence[int], text: str) -> list[Tensor]:
    """The region in PyTorch code.

    Args:
        inputs: its tensors.
        sizes: its symbolic sizes.
        text: a function ``forward(self, *inputs, *sizes)``, as an FX graph prints it.

    Returns:
        Its results, contiguous.
    """
    results = _module(text)["forward"](None, *inputs, *sizes)
    return [result.contiguous() for result in results]


def launch(inputs: Sequence[Tensor], text: str, tiling: int = 0) -> list[Tensor]:
    """The region in Triton code.

    Args:
        inputs: its tensors, all of its sizes among theirs.
        text: a module, as `memopt.rows.source` writes it.
        tiling: which of its configurations.

    Returns:
        Its results, contiguous.
    """
    results: list[Tensor] = _module(text)["launch"](inputs, tiling)
    return results


def _run(
    inputs: Sequence[Tensor], sizes: Sequence[int], plain_text: str, kernel: str, tiling: int = 0
) -> list[Tensor]:
    if any(serves(tensor) for tensor in inputs):
        return launch(inputs, kernel, tiling)
    return plain(inputs, sizes, plain_text)


def _fake(
    inputs: Sequence[Tensor], sizes: Sequence[int], plain_text: str, kernel: str, tiling: int = 0
) -> list[Tensor]:
    return plain(inputs, sizes, plain_text)


torch.library.impl("memopt::region", "default", _run)
torch.library.register_fake("memopt::region", _fake)


@functools.cache
def _module(text: str) -> dict[str, Any]:
    """What a text defines. Triton reads a kernel's source again, and finds it by its file name."""
    name = f"<memopt region {hashlib.sha256(text.encode()).hexdigest()[:16]}>"
    linecache.cache[name] = (len(text), None, text.splitlines(keepends=True), name)
    names = {"torch": torch, "device": torch.device, "inf": math.inf, "nan": math.nan}
    exec(compile(text, name, "exec"), names)
    return names


def as_traced(x: Tensor, strides: Sequence[int]) -> Tensor:
    """The tensor as the kernel expects it in memory: a copy where a compiler laid it out anew."""
    places = zip(x.shape, x.stride(), strides, strict=True)
    if all(size < 2 or mine == traced for size, mine, traced in places):
        return x
    return torch.empty_strided(x.shape, strides, dtype=x.dtype, device=x.device).copy_(x)


def grid(x: Tensor, tiles: int, columns: int, threads: int) -> tuple[int, int]:
    """As many programs as run at a time, each of which goes over several tiles of rows.

    Args:
        x: a tensor where they run.
        tiles: of rows.
        columns: programs of the same rows.
        threads: of a program.
    """
    at_a_time = processors(x) * (_THREADS_PER_PROCESSOR // threads)
    return max(1, min(tiles, math.ceil(at_a_time / columns))), columns
