"""Compute rows in one kernel of our own: pointwise operators, row sums, quantisation, packed bits.

A region of aten nodes over the same rows becomes one operator, ``memopt::region``, that reads each
input once and writes each result once. Inductor fuses much of that too. It needs several kernels,
or goes over wide rows again, where

(1) groups of columns count: bits of a mask, a scale for each group, beside sums of whole rows,
(2) several results need several sums over the same row, one of them for a copy in int8.

On a GPU those of them with results in int8 or bits are timed, in every tiling and as Inductor
compiles them, and the fastest way is taken. Asked for by ``options={"passes": {"fuse_rows":
True}}``, every region becomes a kernel, and nothing is timed. On the CPU a region runs node by
node, which is for tests alone.

Pays: bytes to and from memory, by the remark. Does not: where Inductor would have fused a region
with a product's end, which it does for a few templates.

Source: memopt's own; for the class of kernels, Triton (Tillet et al. 2019, MAPL).
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from memopt.device import DEVICES, DeviceSpec, device_spec, spec_for_product
from memopt.graph import tensors
from memopt.kernels.serving import serves
from memopt.pipeline import PassContext
from memopt.remarks import RemarkKind
from memopt.rows.choice import PACKED, Choice, choose, may_be_faster
from memopt.rows.lowering import lower_rows, replace_regions
from memopt.rows.select import FusedRows, choose_regions


@dataclass(frozen=True)
class FuseRows:
    """Nodes over the same rows -> ``memopt::region``.

    Attributes:
        cpu: whether it runs on the CPU too.
    """

    name: ClassVar[str] = "fuse_rows"
    requires: ClassVar[frozenset[str]] = frozenset()
    establishes: ClassVar[frozenset[str]] = frozenset()
    cpu: bool = False

    def __call__(self, graph: fx.Graph, ctx: PassContext) -> int:
        named = self.name in ctx.config.passes
        seen = [t for n in graph.nodes for t in tensors(n.meta.get("val"))]
        if not self.cpu and not any(map(serves, seen)):
            if named:
                text = "Triton kernels do not run on this device"
                ctx.remark(self.name, RemarkKind.MISSED, text)
            return 0
        if not named and not any(t.dtype in PACKED for t in seen):
            return 0  # and choosing regions takes seconds
        device = _device(seen, ctx)
        lowered = []
        for region in choose_regions(graph):
            if not (named or (_runs(region) and may_be_faster(region.program))):
                continue
            whole = lower_rows(region, device)
            choice = Choice(whole, "not timed") if named else choose(whole)
            count, first = len(region.members), region.members[0].name
            if choice.region is None:
                text = f"{count} operators are left to Inductor: {choice.why}"
                ctx.remark(self.name, RemarkKind.MISSED, text, first)
                continue
            text = (
                f"{count} operators are one kernel, which moves {whole.ideal_bytes} bytes, "
                f"{region.saved_bytes} less than they would: {choice.why}"
            )
            ctx.remark(self.name, RemarkKind.APPLIED, text, first)
            lowered.append(choice.region)
        replace_regions(graph, lowered)
        return len(lowered)


def _runs(region: FusedRows) -> bool:
    """Whether its kernel would."""
    return any(serves(node.meta["val"]) for node in region.members)


def _device(seen: list[torch.Tensor], ctx: PassContext) -> DeviceSpec:
    """What blocks are made for."""
    if ctx.config.device is not None:
        return device_spec(ctx.config.device)
    for tensor in seen:
        if tensor.device.type == "cuda":
            return spec_for_product(torch.cuda.get_device_name(tensor.device))
    return DEVICES["a100"]
