"""Attention by rows of queries: of keys and values all, or those that a mask shows to them.

Encoders of speech that see a few chunks of what was before have masks that show each query a
band of keys. Where the mask is a constant, and the band is narrow, only those keys have to be
there: the whole encoder can be computed piece by piece, as a stream.

Source: chunks that see some before them, and long recordings in one pass, are of ChunkFormer: Le
et al. (2025), arXiv:2502.14673. That a compiler reads the band off the mask is memopt's.
"""

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from memopt.graph import aten
from memopt.passes.joint_nodes import call
from memopt.passes.map_reads import (
    Given,
    Make,
    Read,
    Rows,
    Rule,
    constant,
    constant_of,
    rows_in,
    same,
    shape_of,
    whole_or_part,
)

ATTENTIONS: Mapping[Any, Sequence[str]] = {
    aten._scaled_dot_product_flash_attention_for_cpu.default: (
        *("query", "key", "value", "dropout_p", "is_causal"),
    ),
    aten._scaled_dot_product_efficient_attention.default: (
        *("query", "key", "value", "attn_bias", "compute_log_sumexp", "dropout_p", "is_causal"),
    ),
}
_MASKS = ("attn_mask", "attn_bias")
_BAND = "memopt_band"  # in a node's ``meta``
_SMALL = 1 / 16  # of a mask: a block that becomes a constant
_LENGTH = 2  # the dimension of queries and keys
_NARROW = 0.5  # of the keys: what a band has at most
_MOST = 2**27  # numbers of a mask that is computed while compiling


def of_attention(node: fx.Node, dims: Mapping[fx.Node, int]) -> Rule | None:
    """Rows of queries, or entries of a batch."""
    given: dict[str, Any] = dict(zip(ATTENTIONS[node.target], node.args, strict=False))
    given.update(node.kwargs)
    triple = [given[name] for name in ("query", "key", "value")]
    mask = next((given[name] for name in _MASKS if given.get(name) is not None), None)
    if mask in dims or mask in triple or triple[0] in triple[1:]:
        return None
    if given.get("is_causal") or given.get("dropout_p"):
        return None
    if any(user.target is not operator.getitem or user.args[1] for user in node.users):
        return None  # what it returns for a backward
    places = [dims.get(n) for n in triple]
    if places == [0, 0, 0] and (mask is None or _size(mask, 0) == 1):
        return Rule(0, tuple(Read(n, 0, same) for n in triple), _attend(node, triple))
    if places[0] != _LENGTH:
        return None
    if places == [_LENGTH] * 3 and mask is not None:
        if _BAND not in mask.meta:  # the same for all layers, and for copies of the graph
            mask.meta[_BAND] = _Band.of(mask, triple)
        if band := mask.meta[_BAND]:
            return _by_band(node, triple, mask, band)
    return _by_queries(node, triple, mask)


def _by_queries(node: fx.Node, triple: Sequence[fx.Node], mask: fx.Node | None) -> Rule:
    """Keys and values are whole."""
    rows_of_mask = mask is not None and _size(mask, _LENGTH) > 1
    reads = [Read(triple[0], _LENGTH, same)]
    if mask is not None and rows_of_mask:
        reads.append(Read(mask, _rank(mask) - 2, same))
    return Rule(_LENGTH, tuple(reads), _attend(node, triple))


def _attend(node: fx.Node, triple: Sequence[fx.Node]) -> Make:
    """The same attention, on rows; heads are dense, as its kernels want them."""

    def make(graph: fx.Graph, rows: Rows, given: Given) -> fx.Node:
        def placed(argument: fx.Node) -> fx.Node:
            part = whole_or_part(given, argument)
            if argument not in triple or part.meta["val"].stride(-1) == 1:
                return part
            dense = {"memory_format": torch.contiguous_format}
            return call(graph, aten.clone.default, part, like=part, **dense)

        args, kwargs = fx.map_arg((node.args, node.kwargs), placed)
        return call(graph, node.target, *args, like=node, **kwargs)

    return make


@dataclass(frozen=True)
class _Band:
    """What a mask shows.

    Attributes:
        mask: of ``(queries, keys)``, as the operator takes it.
        first: for each query the first key that it sees.
        end: the one after the last.
    """

    mask: Tensor
    first: Tensor
    end: Tensor

    @classmethod
    def of(cls, mask: fx.Node, triple: Sequence[fx.Node]) -> "_Band | None":
        """None where a mask is no constant, is not the same for all heads, or shows too much."""
        shape = shape_of(mask) or torch.Size()
        lengths = [rows_in(n, _LENGTH) for n in triple[:2]]
        if [*shape[-2:]] != lengths or shape[-2:].numel() > _MOST:
            return None
        value = constant_of(mask)
        if value is None:
            return None
        for _ in shape[:-2]:
            if not torch.equal(value, value[:1].expand_as(value)):
                return None
            value = value[0]
        is_bool = value.dtype == torch.bool
        shown = (value if is_bool else ~(value <= torch.finfo(value.dtype).min)).to(torch.uint8)
        if not shown.any(-1).all():  # a query that sees nothing attends to all keys alike
            return None
        first = shown.argmax(-1)
        end = shown.shape[-1] - shown.flip(-1).argmax(-1)
        narrow = int((end - first).max()) <= _NARROW * lengths[1]
        return cls(value, first, end) if narrow else None

    def window(self, a: int, b: int) -> tuple[int, int]:
        """The keys that some queries see."""
        return int(self.first[a:b].min()), int(self.end[a:b].max())


def _by_band(node: fx.Node, triple: Sequence[fx.Node], mask: fx.Node, band: _Band) -> Rule:
    query, key, value = triple
    attend = _attend(node, triple)
    reads = Read(query, _LENGTH, same), *(Read(n, _LENGTH, band.window) for n in (key, value))

    def make(graph: fx.Graph, rows: Rows, given: Given) -> fx.Node:
        first, end = given[key].start, given[key].end
        block = band.mask[rows.start : rows.end, first:end]
        if block.numel() > _SMALL * band.mask.numel():  # many would take more than the mask does
            shown = whole_or_part(given, mask)
            for dim, a, b in ((-2, rows.start, rows.end), (-1, first, end)):
                shown = call(graph, aten.slice.Tensor, shown, dim, a, b, like=node)
        else:
            held = constant(graph, block, like=mask)
            # Inductor hands a constant to an operator as it is, and its fake kernel refuses that.
            shown = call(graph, aten.clone.default, held, like=node)
            sizes = [*(shape_of(mask) or ())[:-2], *block.shape]
            shown = call(graph, aten.expand.default, shown, sizes, like=node)
        return attend(graph, rows, {**given, mask: Rows(shown, rows.start, rows.end)})

    return Rule(_LENGTH, reads, make)


def _rank(node: fx.Node) -> int:
    return len(shape_of(node) or ())


def _size(node: fx.Node, dim: int) -> int:
    """Of a mask that is broadcast to four dimensions."""
    shape = shape_of(node) or torch.Size()
    at = dim - 4 + len(shape)
    return int(shape[at]) if at >= 0 else 1
