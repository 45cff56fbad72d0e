"""The last linear layer of a model, and the gradients of its inputs.

Legend: ``N`` tokens, ``H`` hidden size, ``V`` vocabulary, ``C`` rows of a chunk, ``R`` rows of a
block.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from memopt._torch import size_hint
from memopt.kernels.blocks import block_rows, pieces

# The weight gradient is rounded once per chunk; beyond this many it is kept in float32.
MAX_ROUNDINGS = 8
# Float16 loses softmax entries under 6e-8. Its gradients are kept at this size, whatever the
# number of tokens, and scaled at the end.
HALF_UNIT = 8.0


@dataclass(frozen=True)
class Head:
    """``softcap * tanh(scale * (x @ weight.T + bias) / softcap)``, or without the cap.

    Attributes:
        x_NH: hidden states.
        weight_VH: one row per class.
        bias_V: added to the product, or None.
        scale: factor on the product.
        softcap: bound on the result; 0 for none.
    """

    x_NH: Tensor
    weight_VH: Tensor
    bias_V: Tensor | None = None
    scale: float = 1.0
    softcap: float = 0.0

    @property
    def wide(self) -> torch.dtype:
        """The dtype that losses are computed in: float32, or float64 where the input is."""
        return torch.promote_types(self.x_NH.dtype, torch.float32)

    def product(self, x_CH: Tensor, out: Tensor) -> Tensor:
        """The raw product of some hidden states, in the model's dtype."""
        if self.bias_V is None:
            return torch.mm(x_CH, self.weight_VH.t(), out=out)
        return torch.addmm(self.bias_V, x_CH, self.weight_VH.t(), out=out)

    def activate(self, raw_RV: Tensor, *, in_place: bool = False) -> Tensor:
        """Raw product to logits, in the wide dtype.

        Args:
            raw_RV: the product.
            in_place: whether logits of its dtype may take its place.
        """
        z = raw_RV.to(self.wide)
        if self.scale != 1.0 or self.softcap:
            factor = self.scale / (self.softcap or 1.0)
            in_place = in_place or z.dtype != raw_RV.dtype
            z = z.mul_(factor) if in_place else z * factor
        return z.tanh_().mul_(self.softcap) if self.softcap else z

    def deactivate_(self, gradient_RV: Tensor, z_RV: Tensor) -> None:
        """Gradient of logits to gradient of the raw product, in place; overwrites the logits."""
        if self.softcap:
            slope = z_RV.div_(self.softcap).square_().neg_().add_(1.0)
            gradient_RV.mul_(slope)
        if self.scale != 1.0:
            gradient_RV.mul_(self.scale)


class Sizes(NamedTuple):
    """What the memory for a head's loss and gradients depends on.

    Attributes:
        rows: ``N``.
        width: ``H``.
        classes: ``V``.
        dtype: of the hidden states and the weight.
        wanted: whether the gradients of the hidden states, the weight and the bias are; none
            where there is no upstream gradient.
    """

    rows: int
    width: int
    classes: int
    dtype: torch.dtype
    wanted: Sequence[bool]

    @classmethod
    def of(cls, x_NH: Tensor, weight_VH: Tensor, wanted: Sequence[bool]) -> "Sizes":
        """Of tensors, fake or real; with no wanted gradients, of the values alone."""
        rows, width = map(size_hint, x_NH.shape)
        classes = size_hint(weight_VH.shape[0])
        return cls(rows, width, classes, x_NH.dtype, wanted or (False, False, False))


@dataclass
class Gradients:
    """Gradients of a head's inputs, filled chunk by chunk; None where not wanted.

    Attributes:
        x_NH: of the hidden states.
        weight_VH: of the weight; not initialised before the first chunk.
        bias_V: of the bias.
        empty: whether no chunk has been added yet.
    """

    x_NH: Tensor | None
    weight_VH: Tensor | None
    bias_V: Tensor | None
    empty: bool = True

    @classmethod
    def of(
        cls,
        head: Head,
        wanted: Sequence[bool],
        chunks: int,
        *,
        sparse: bool = False,
        exact: bool = False,
        in_place: bool = False,
    ) -> "Gradients":
        """Buffers for the wanted gradients.

        Args:
            head: whose inputs they are of.
            wanted: of the hidden states, the weight, the bias.
            chunks: number of chunks to be added up.
            sparse: whether some rows of the hidden states get no gradient.
            exact: whether to add up in the wide dtype however few chunks there are.
            in_place: whether the hidden states' gradient takes their place.
        """
        x, weight, bias = wanted
        half = head.x_NH.dtype == torch.float16
        x_dtype = head.wide if half else head.x_NH.dtype
        exact = exact or half or chunks > MAX_ROUNDINGS
        weight_dtype = head.wide if exact else head.weight_VH.dtype
        zeros, new = head.x_NH.new_zeros, head.x_NH.new_empty
        make = zeros if sparse else new
        return cls(  # contiguous, whatever the strides of the inputs
            head.x_NH if in_place else make(head.x_NH.shape, dtype=x_dtype) if x else None,
            new(head.weight_VH.shape, dtype=weight_dtype) if weight else None,
            zeros(len(head.weight_VH), dtype=head.wide) if bias else None,
        )

    def add_(
        self,
        gradient_CV: Tensor,
        x_CH: Tensor,
        head: Head,
        rows: slice | Tensor,
        spare_CH: Tensor | None = None,
    ) -> None:
        """Bring the gradient of one chunk's product to the inputs.

        Args:
            gradient_CV: the gradient.
            x_CH: the chunk's hidden states.
            head: the linear layer.
            rows: which rows of the whole the chunk is.
            spare_CH: takes the hidden states' gradient where ``rows`` is a list; may be ``x_CH``.
        """
        if self.weight_VH is not None:
            if self.weight_VH.dtype != gradient_CV.dtype:
                classes, hidden = self.weight_VH.shape
                if self.empty:
                    self.weight_VH.zero_()
                for part in pieces(classes, block_rows(hidden, 4)):
                    _add_product_(self.weight_VH[part], gradient_CV[:, part].t(), x_CH)
            elif self.empty:
                torch.mm(gradient_CV.t(), x_CH, out=self.weight_VH)
            else:
                self.weight_VH.addmm_(gradient_CV.t(), x_CH)
        if self.bias_V is not None:
            self.bias_V += gradient_CV.sum(0, dtype=self.bias_V.dtype)
        if self.x_NH is not None:
            if isinstance(rows, Tensor):
                out = None if spare_CH is None else spare_CH[: len(rows)]
                own = torch.mm(gradient_CV, head.weight_VH, out=out)
                self.x_NH.index_copy_(0, rows, own.to(self.x_NH.dtype))
            elif self.x_NH.dtype == gradient_CV.dtype:
                torch.mm(gradient_CV, head.weight_VH, out=self.x_NH[rows])
            else:
                self.x_NH[rows] = torch.mm(gradient_CV, head.weight_VH).to(self.x_NH.dtype)
        self.empty = False

    def results(self, head: Head) -> tuple[Tensor, Tensor, Tensor]:
        """All three in their inputs' dtypes (float16 in float32); empty where not wanted."""
        if self.empty and self.weight_VH is not None:
            self.weight_VH.zero_()
        dtype = head.wide if head.x_NH.dtype == torch.float16 else head.x_NH.dtype
        x, weight, bias = (
            head.x_NH.new_empty(0, dtype=dtype) if g is None else g.to(dtype)
            for g in (self.x_NH, self.weight_VH, self.bias_V)
        )
        return x, weight, bias


def _add_product_(sum_RH: Tensor, left_RC: Tensor, right_CH: Tensor) -> None:
    """Add a product of float16 or bfloat16 to a float32 sum.

    CUDA leaves the product in float32. Elsewhere it is rounded to its factors' dtype. The
    roundings of all chunks together are as large as that of the whole product, which eager has
    alone, so with the last one the sum is off by up to √2 of eager's error.
    """
    if left_RC.device.type == "cuda" and torch.version.hip is None:
        sum_RH.add_(torch.mm(left_RC, right_CH, out_dtype=torch.float32))
    else:
        sum_RH.add_(torch.mm(left_RC, right_CH))
