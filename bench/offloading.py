"""What torch itself offers to hold saved values on the host."""

from typing import Any

import torch
import torch._functorch.config
import torch._inductor.config
from torch import fx, nn

_LEAST_BYTES = 2**20  # of a value, as memopt's pass has it


class Offloaded(nn.Module):
    """A module whose saved values are copied to pinned memory when they are saved.

    Args:
        module: what is run.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        with torch.autograd.graph.save_on_cpu(pin_memory=True):
            return self.module(*args, **kwargs)


def offload_in_inductor() -> None:
    """Switch on torch's offloading at compile time, with copies beside the step.

    It moves what is marked; nothing marks values but tests of its own, so that is done here.
    """
    torch._functorch.config.enable_activation_offloading = True
    torch._functorch.config.activation_offload_separate_stream = True
    torch._functorch.config.activation_reload_prefetch = True
    torch._inductor.config.joint_custom_pre_pass = mark_large_values


def mark_large_values(graph: fx.Graph) -> None:
    """Mark what torch may move: results of 1 MiB and more."""
    for node in graph.nodes:
        value = node.meta.get("val")
        if node.op == "call_function" and isinstance(value, torch.Tensor):
            node.meta["should_offload"] = value.nbytes >= _LEAST_BYTES
