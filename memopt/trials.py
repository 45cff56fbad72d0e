"""Seconds of a small graph as stock Inductor compiles it."""

from collections.abc import Sequence

import torch
from torch import Tensor, fx

from memopt.kernels.measured import best_seconds


def seconds(graph: fx.GraphModule, inputs: Sequence[Tensor], device: torch.device) -> float:
    """Of one run of a graph, compiled, on these inputs: the best of three."""
    compiled = torch.compile(graph, fullgraph=True)
    return best_seconds(lambda: compiled(*inputs), device)
