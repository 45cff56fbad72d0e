"""Compute rows in one kernel of our own: pointwise operators, row sums, quantisation, packed bits.

A region of aten nodes over the same rows becomes one operator, ``memopt::region``, that reads each
input once and writes each result once. Inductor fuses much of that too. It does not where

(1) a result has fewer entries than its row has columns: bits of a mask, a scale for each group,
(2) several results need several sums over the same row, one of them for a copy in int8.

Pays: bytes to and from memory, by the remark. Does not: where Inductor would have fused a region
with a product's end, which it does for a few templates. So it runs where it is asked for by
``options={"passes": {"fuse_rows": True}}``, and on the CPU, where a region runs node by node, for
tests alone.

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
from memopt.row_lowering import replace_regions


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
        if self.name not in ctx.config.passes:
            return 0
        seen = [t for n in graph.nodes for t in tensors(n.meta.get("val"))]
        if not self.cpu and not any(map(serves, seen)):
            ctx.remark(self.name, RemarkKind.MISSED, "Triton kernels do not run on this device")
            return 0
        lowered = replace_regions(graph, _device(seen, ctx))
        for region in lowered:
            first = region.region.members[0]
            text = (
                f"{len(region.region.members)} operators are one kernel, which moves "
                f"{region.ideal_bytes} bytes, {region.region.saved_bytes} less than they would"
            )
            ctx.remark(self.name, RemarkKind.APPLIED, text, first.name)
        return len(lowered)


def _device(seen: list[torch.Tensor], ctx: PassContext) -> DeviceSpec:
    """What blocks are made for."""
    if ctx.config.device is not None:
        return device_spec(ctx.config.device)
    for tensor in seen:
        if tensor.device.type == "cuda":
            return spec_for_product(torch.cuda.get_device_name(tensor.device))
    return DEVICES["a100"]
