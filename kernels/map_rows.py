"""Rows of maps: put some into a map, and keep some when the others go.

A map is a tensor with dimensions in space or time, as images and sounds are; its rows are its
entries along one of them. Plans have `PUT`, which gives a new map; what runs writes into the old
one (see ``memopt.passes.map_moves``). To a compiler `KEEP` is opaque, so that it is done where it
stands: what the rows are a part of can go there, and no loop of the next piece merges with this
one's.

Source: memopt's own.
"""

import torch
from torch import Tensor

for _schema in (
    "put_rows(Tensor x, Tensor rows, int dim, int start, int channel) -> Tensor",
    "keep_rows(Tensor rows, MemoryFormat layout) -> Tensor",
):
    _name, _arguments = _schema.split("(")
    _tags = (torch.Tag.flexible_layout,)
    torch.library.define(f"memopt::{_name}", f"({_arguments}", tags=_tags)
PUT = torch.ops.memopt.put_rows.default
KEEP = torch.ops.memopt.keep_rows.default


def _put(x: Tensor, rows: Tensor, dim: int, start: int, channel: int) -> Tensor:
    """``x`` with other rows from ``start`` on, and there in the channels from ``channel`` on."""
    changed = x.clone()
    place = changed.narrow(dim, start, rows.shape[dim])
    if rows.dim() > 1 and rows.shape[1] != place.shape[1]:
        place = place.narrow(1, channel, rows.shape[1])
    place.copy_(rows)
    return changed


def _keep(rows: Tensor, layout: torch.memory_format) -> Tensor:
    """A copy in a layout."""
    return rows.clone(memory_format=layout)


for _name, _function in (("put_rows", _put), ("keep_rows", _keep)):
    torch.library.impl(f"memopt::{_name}", "default", _function)
    torch.library.register_fake(f"memopt::{_name}", _function)
