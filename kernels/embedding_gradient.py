"""Gradient of an embedding in the weight's own dtype, with no float32 copy of the weight's size.

Rows that several tokens share must be added up in float32, or small gradients are lost. Inductor
does so in a float32 tensor of the weight's size; only the rows that occur need one.

Pays: for bfloat16 and float16 weights, four bytes per entry of the weight. Does not: in float32.
"""

import torch
from torch import Tensor

from memopt._torch import size_hint

torch.library.define(
    "memopt::embedding_gradient",
    "(Tensor index, Tensor counted, Tensor values, SymInt rows) -> Tensor",
    tags=(torch.Tag.cudagraph_unsafe,),  # the number of rows that occur is read on the host
)
EMBEDDING_GRADIENT = torch.ops.memopt.embedding_gradient.default


@torch.library.impl("memopt::embedding_gradient", "default")
def _embedding_gradient(index: Tensor, counted: Tensor, values: Tensor, rows: int) -> Tensor:
    """Sum of values by row, in float32, rounded once.

    Args:
        index: `(...)`, int64, the row of each token; negative ones count from the end.
        counted: `(...)`, bool, which tokens have a gradient.
        values: `(..., H)`, the gradient of each token's embedding.
        rows: number of rows.
    """
    width = values.shape[-1]
    flat = torch.where(counted.reshape(-1, 1), values.reshape(-1, width).float(), 0.0)
    found, place = torch.unique(index.reshape(-1) % rows, return_inverse=True)
    sums = flat.new_zeros(len(found), width).index_add_(0, place, flat)
    result = values.new_zeros(rows, width)
    result[found] = sums.to(values.dtype)
    return result


def _fake(index: Tensor, counted: Tensor, values: Tensor, rows: int) -> Tensor:
    return values.new_empty(rows, values.shape[-1])


torch.library.register_fake("memopt::embedding_gradient", _fake)


def scratch_bytes(index: Tensor, counted: Tensor, values: Tensor, rows: int) -> int:
    """What it allocates besides its result, in bytes, where every token is another one."""
    tokens, width = size_hint(index.numel()), size_hint(values.shape[-1])
    return tokens * (width * (8 + values.element_size()) + 40)
