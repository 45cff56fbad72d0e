"""The last linear layer of a model, evaluated a few rows at a time.

The product of ``N`` hidden states with ``V`` weight rows is the largest tensor of many models.
Here it exists one chunk at a time: a buffer of ``C`` rows takes a product, a row loss turns it
into its own gradient in place, and two more products bring that to the hidden state and to the
weight.

Legend: ``N`` tokens, ``H`` hidden size, ``V`` vocabulary, ``C`` rows of a chunk, ``R`` rows of a
block.
"""

import functools
import importlib.util
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from memopt.kernels.rows import CrossEntropy, IndexTargets, RowLoss, log_sum_exp

# A block of rows is converted, exponentiated and turned into its gradient while it is in cache.
_BLOCK_BYTES = 8 * 2**20
# The weight gradient is rounded once per chunk; beyond this many it is kept in float32.
_MAX_ROUNDINGS = 8
# Every chunk reads and writes the weight gradient once; with this many rows the products hide it.
_CHUNK_ROWS = {"cpu": 256, "cuda": 2048}
# Numbers per row of a chunk that a row loss holds at most: values, normalisers, targets, factors.
_VECTORS = 9
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
        exact = exact or half or chunks > _MAX_ROUNDINGS
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
                for part in pieces(classes, block_rows(hidden, 4)):
                    own = torch.mm(gradient_CV[:, part].t(), x_CH)
                    self.weight_VH[part] = own if self.empty else self.weight_VH[part].add_(own)
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


def pieces(rows: int, size: int) -> Iterator[slice]:
    """``range(rows)`` in slices of at most ``size``."""
    for start in range(0, rows, size):
        yield slice(start, min(start + size, rows))


def block_rows(width: int, itemsize: int) -> int:
    """Rows of a block that stays in cache."""
    return max(1, _BLOCK_BYTES // (width * itemsize))


def default_chunk_rows(rows: int, classes: int, device: torch.device) -> int:
    """Rows of a chunk: few enough to be small, enough to keep the products fast.

    Where the classes are so few that more rows fit a block in cache, it takes those too, up to a
    quarter of all. The products may need more; but the logits are never whole.

    Args:
        rows: how many there are in all.
        classes: length of a row.
        device: where the products run.
    """
    fast = _CHUNK_ROWS.get(device.type, _CHUNK_ROWS["cuda"])
    cached = min(block_rows(max(1, classes), 4), rows // 4)
    return max(1, min(-(-rows // 2), max(fast, cached)))


def has_row_kernel(loss: type[RowLoss], x: Tensor) -> bool:
    """Whether ``run_rows`` is one Triton kernel, which holds nothing of a block's size.

    So it is for cross-entropy against classes on a GPU that Triton knows well, NVIDIA's since
    Ampere and AMD's, if Triton is installed.

    Args:
        loss: what is computed of each row.
        x: a tensor, fake or real, of the dtype and on the device of the products.
    """
    return (
        issubclass(loss, IndexTargets)
        and x.device.type == "cuda"
        and x.dtype in (torch.float32, torch.bfloat16, torch.float16)
        and _triton_is_installed()
        and torch.cuda.is_available()
        and torch.cuda.get_device_capability(x.device) >= (8, 0)
    )


@functools.cache
def _triton_is_installed() -> bool:
    return importlib.util.find_spec("triton") is not None


def run_chunks(
    head: Head,
    loss: RowLoss,
    chunk_rows: int,
    wanted: Sequence[bool],
    g_N: Tensor | None,
    h_N: Tensor | None = None,
    rows: Tensor | None = None,
    kept_NV: Tensor | None = None,
    *,
    in_place: bool = False,
) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor, Tensor]]:
    """Values, log-sum-exps and gradients of all rows, chunk by chunk.

    What it allocates does not depend on ``rows``: see ``scratch_bytes``.

    Args:
        head: maps hidden states to logits.
        loss: what to compute.
        chunk_rows: rows whose logits exist at a time.
        wanted: whether the gradients of the hidden states, the weight and the bias are.
        g_N: upstream gradient of every row's value, or None for values only.
        h_N: upstream gradient of every row's log-sum-exp.
        rows: the rows to visit, or None for all; the others' values and gradients are 0.
        kept_NV: takes the raw product of the rows that are visited.
        in_place: whether a chunk's hidden states make room for their gradient, of the same dtype.
    """
    count = len(head.x_NH) if rows is None else len(rows)
    size = min(chunk_rows, len(head.x_NH))
    most = -(-len(head.x_NH) // chunk_rows)
    gradients = Gradients.of(head, wanted, most, sparse=rows is not None, in_place=in_place)
    values = head.x_NH.new_zeros(len(head.x_NH), dtype=head.wide)
    lse = torch.zeros_like(values)
    raw = head.x_NH.new_empty(size, len(head.weight_VH))
    spare = head.x_NH.new_empty(size, head.x_NH.shape[1])
    block = softmax_block(head, loss, raw, trained=g_N is not None)
    for part in pieces(count, chunk_rows):
        if rows is None:
            own: slice | Tensor = part
            x = head.x_NH[part]
        else:
            own = rows[part]
            x = torch.index_select(head.x_NH, 0, own, out=spare[: len(own)])
        chunk = head.product(x, raw[: len(x)])
        if kept_NV is not None:
            kept_NV[own] = chunk
        values[own], lse[own] = run_rows(head, loss, chunk, own, g_N, h_N, block)
        if g_N is not None:
            gradients.add_(chunk, x, head, own, spare)
    del raw, spare, block
    return values, lse, gradients.results(head)


def scratch_bytes(
    rows: int,
    width: int,
    classes: int,
    itemsize: int,
    chunk_rows: int,
    *,
    blocks: int,
    held: int,
    exact: bool,
) -> int:
    """What ``run_chunks`` allocates at most at a time, its results left out.

    Args:
        rows: ``N``.
        width: ``H``.
        classes: ``V``.
        itemsize: bytes of one element of the model's dtype.
        chunk_rows: rows of a chunk.
        blocks: tensors of the size of a block that a row loss and the head hold at a time.
        held: how many of them are there during the products too.
        exact: whether the weight gradient is added up in float32, and not the result itself.
    """
    size, wide = min(chunk_rows, rows), max(4, itemsize)
    block = min(size, block_rows(classes, wide)) * classes * wide
    chunk = size * ((classes + width) * itemsize + _VECTORS * wide)
    loop = blocks * block
    if exact:  # a part of the product, converted; and the result is not there before the end
        part = min(classes, block_rows(width, 4)) * width
        loop = max(loop, held * block + part * (itemsize + 4))
        chunk = max(chunk + loop + classes * width * (4 - itemsize), classes * width * 4)
        return chunk + rows * 3 * wide
    return chunk + loop + rows * 3 * wide


def softmax_block(head: Head, loss: RowLoss, raw_CV: Tensor, *, trained: bool) -> Tensor | None:
    """Takes the softmax of a block of rows; None where it may take its logits' place, or is none.

    Args:
        head: maps hidden states to logits.
        loss: what to compute.
        raw_CV: the product of a chunk.
        trained: whether gradients are computed.
    """
    in_place = isinstance(loss, CrossEntropy) and not head.softcap
    if in_place or not trained or has_row_kernel(type(loss), raw_CV):
        return None
    rows, classes = raw_CV.shape
    height = min(rows, block_rows(classes, head.wide.itemsize))
    return raw_CV.new_empty(height, classes, dtype=head.wide)


def run_rows(
    head: Head,
    loss: RowLoss,
    raw_CV: Tensor,
    rows: slice | Tensor,
    g_N: Tensor | None,
    h_N: Tensor | None = None,
    block_RV: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Values and log-sum-exps of one chunk; with ``g_N`` its gradient replaces ``raw_CV``.

    What follows the choice of a kernel is the reference for it.

    Args:
        head: maps the raw product to logits.
        loss: what to compute.
        raw_CV: the raw product; overwritten, with its gradient if there is an upstream one.
        rows: which rows of the whole the chunk is.
        g_N: upstream gradient of every row's value, or None for values only.
        h_N: upstream gradient of every row's log-sum-exp.
        block_RV: what ``softmax_block`` returned, if it is at hand.
    """
    if block_RV is None:
        block_RV = softmax_block(head, loss, raw_CV, trained=g_N is not None)
    chunk = loss.at(rows)
    if has_row_kernel(type(loss), raw_CV):
        from memopt.kernels import triton_rows  # here, because Triton is optional

        assert isinstance(chunk, IndexTargets)
        g_C, h_C = (None if t is None else t[rows] for t in (g_N, h_N))
        return triton_rows.run(raw_CV, chunk, head.scale, head.softcap, g_C, h_C)
    values, normalisers = [], []
    for part in pieces(len(raw_CV), block_rows(raw_CV.shape[1], head.wide.itemsize)):
        own, block, raw = _rows_of(rows, part), chunk.at(part), raw_CV[part]
        z = head.activate(raw, in_place=True)
        p = z if block_RV is None else block_RV[: len(z)]
        top = z.amax(1)
        if isinstance(block, CrossEntropy):
            offset = block.offset(z)
            lse = log_sum_exp(top, torch.softmax(z, 1, out=p))
            value = block.factor(z.shape[1], z.dtype) * lse - offset
        else:
            apart = None if block_RV is None else p
            lse = log_sum_exp(top, torch.softmax(z, 1, out=apart))
            value = block.values(z, lse)
        values.append(value)
        normalisers.append(lse)
        if g_N is not None:
            block.gradient_(p, z, lse, g_N[own], None if h_N is None else h_N[own])
            head.deactivate_(p, z)
            raw.copy_(p)
        del z, p  # before the next block takes their place
    return torch.cat(values), torch.cat(normalisers)


def _rows_of(rows: slice | Tensor, part: slice) -> slice | Tensor:
    """Rows of the whole that a part of the chunk ``rows`` covers."""
    if isinstance(rows, Tensor):
        return rows[part]
    return slice(rows.start + part.start, rows.start + part.stop)
