"""Where Triton kernels run: on GPUs that Triton knows well, if it is installed."""

import functools
import importlib
import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

# Masks and packed numbers are of whole numbers.
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.bool, torch.uint8)


def serves(x: Tensor) -> bool:
    """Whether a Triton kernel runs on such a tensor.

    Args:
        x: fake or real.
    """
    return x.dtype in _DTYPES and knows(x.device)


def knows(device: torch.device) -> bool:
    """Whether Triton is there and compiles for NVIDIA's GPUs since Ampere, and AMD's."""
    return (
        device.type == "cuda"
        and _triton_is_installed()
        and torch.cuda.is_available()
        and torch.cuda.get_device_capability(device) >= (8, 0)
    )


def launched(module: str, name: str) -> Callable[..., Any]:
    """A function of a module with Triton code, imported at the first call: Triton is optional.

    Args:
        module: in `memopt.kernels`.
        name: of the function.
    """

    def launch(*args: Any, **options: Any) -> Any:
        found = importlib.import_module(f"memopt.kernels.{module}")
        return getattr(found, name)(*args, **options)

    return launch


@functools.cache
def _triton_is_installed() -> bool:
    return importlib.util.find_spec("triton") is not None


def processors(x: Tensor) -> int:
    """How many programs run at a time where a tensor is; one where kernels are interpreted."""
    if x.device.type != "cuda":
        return 1
    return int(torch.cuda.get_device_properties(x.device).multi_processor_count)


def warps(threads: int) -> int:
    """How many warps, or wavefronts on an AMD GPU, so many threads are.

    Args:
        threads: a power of two.
    """
    size = 32 if torch.version.hip is None else 64
    return max(1, threads // size)
