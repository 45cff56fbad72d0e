"""Gradient of an embedding in the weight's own dtype, with no float32 copy of the weight's size.

Rows that several tokens share must be added up in float32, or small gradients are lost. Inductor
does so in a float32 tensor of the weight's size; only the rows that occur need one.

Pays: for bfloat16 and float16 weights, four bytes per entry of the weight, and two more where the
weight has another gradient that the rows can be added to. Does not: in float32.
"""

import torch
from torch import Tensor

from memopt._torch import size_hint

torch.library.define(
    "memopt::embedding_gradient",
    "(Tensor index, Tensor counted, Tensor values, SymInt rows) -> Tensor",
    tags=(torch.Tag.cudagraph_unsafe,),  # the number of rows that occur is read on the host
)
torch.library.define(
    "memopt::embedding_rows",
    "(Tensor rows, Tensor index, Tensor counted, Tensor values) -> Tensor",
    tags=(torch.Tag.cudagraph_unsafe,),
)
EMBEDDING_GRADIENT = torch.ops.memopt.embedding_gradient.default
EMBEDDING_ROWS = torch.ops.memopt.embedding_rows.default


@torch.library.impl("memopt::embedding_gradient", "default")
def _embedding_gradient(index: Tensor, counted: Tensor, values: Tensor, rows: int) -> Tensor:
    """Sum of values by row, in float32, rounded once.

    Args:
        index: `(...)`, int64, the row of each token; negative ones count from the end.
        counted: `(...)`, bool, which tokens have a gradient.
        values: `(..., H)`, the gradient of each token's embedding.
        rows: number of rows.
    """
    found, _, sums = _sums(index % rows, counted, values)
    result = values.new_zeros(rows, values.shape[-1])
    result[found] = sums.to(values.dtype)
    return result


@torch.library.impl("memopt::embedding_rows", "default")
def _embedding_rows(rows: Tensor, index: Tensor, counted: Tensor, values: Tensor) -> Tensor:
    """What each token's row of another gradient becomes: with all of the row's tokens added to it.

    The sum is rounded once; eager rounds the embedding's gradient, then the sum.

    Args:
        rows: `(..., H)`, the other gradient's row of each token.
        index: `(...)`, int64, the row of each token, from 0.
        counted: `(...)`, bool, which tokens have a gradient.
        values: `(..., H)`, the gradient of each token's embedding.
    """
    _, place, sums = _sums(index, counted, values)
    total = sums[place].view(values.shape)
    return total.add_(rows).to(values.dtype)


def _sums(index: Tensor, counted: Tensor, values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Rows that occur, the place of each token's row among them, and their float32 sums."""
    width = values.shape[-1]
    flat = torch.where(counted.reshape(-1, 1), values.reshape(-1, width).float(), 0.0)
    found, place = torch.unique(index.reshape(-1), return_inverse=True)
    return found, place, flat.new_zeros(len(found), width).index_add_(0, place, flat)


def _fake(index: Tensor, counted: Tensor, values: Tensor, rows: int) -> Tensor:
    return values.new_empty(rows, values.shape[-1])


def _fake_rows(rows: Tensor, index: Tensor, counted: Tensor, values: Tensor) -> Tensor:
    return torch.empty_like(values, memory_format=torch.contiguous_format)


torch.library.register_fake("memopt::embedding_gradient", _fake)
torch.library.register_fake("memopt::embedding_rows", _fake_rows)


def rows_scratch_bytes(rows: Tensor, index: Tensor, counted: Tensor, values: Tensor) -> int:
    """What ``embedding_rows`` allocates besides its result, in bytes, at most."""
    tokens, width = size_hint(index.numel()), size_hint(values.shape[-1])
    return tokens * (width * 10 + 40)


def scratch_bytes(index: Tensor, counted: Tensor, values: Tensor, rows: int) -> int:
    """What it allocates besides its result, in bytes, where every token is another one."""
    tokens, width = size_hint(index.numel()), size_hint(values.shape[-1])
    sums = tokens * width * 8 - size_hint(rows) * width * values.element_size()  # no result yet
    return max(sums, tokens * width * (4 + values.element_size())) + tokens * 40
