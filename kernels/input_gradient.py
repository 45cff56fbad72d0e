"""Gradient of a convolution's input, which depends on the input's shape alone.

Torch's backward of a convolution takes the input, and reads it for the weight's gradient only.
Where the weight is frozen nothing needs it, yet it would be saved.

Pays: the input of every convolution whose weight is frozen. Does not: where the weight is trained.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from memopt.graph import aten

torch.library.define(
    "memopt::convolution_input_gradient",
    "(Tensor dy, Tensor weight, SymInt[] shape, SymInt[] strides, SymInt[] stride, "
    "SymInt[] padding, SymInt[] dilation, bool transposed, SymInt[] output_padding, "
    "SymInt groups) -> Tensor",
)
INPUT_GRADIENT = torch.ops.memopt.convolution_input_gradient.default


@torch.library.impl("memopt::convolution_input_gradient", "default")
def _input_gradient(
    dy: Tensor, weight: Tensor, shape: Sequence[int], strides: Sequence[int], *geometry: object
) -> Tensor:
    """The gradient by torch's own kernel, which gets an input without contents.

    Args:
        dy: `(N, C_out, ...)`, the gradient of the result.
        weight: as the convolution's.
        shape: of its input, `(N, C_in, ...)`.
        strides: of its input: their order decides which kernel runs.
        geometry: stride, padding, dilation, whether it is transposed, output padding, groups.

    Returns:
        `(N, C_in, ...)`.
    """
    x = dy.new_empty_strided(shape, strides)
    mask = [True, False, False]
    gradient: Tensor = aten.convolution_backward.default(dy, x, weight, None, *geometry, mask)[0]
    return gradient


torch.library.register_fake("memopt::convolution_input_gradient", _input_gradient)
