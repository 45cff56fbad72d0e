"""Rows of maps: taken out of one map, put into another.

A map is a tensor with dimensions in space or time, as images and sounds are; its rows are its
entries along one of them. To a compiler both operators are opaque: which rows they move is an
argument, so that the code between them is the same for all rows.

Pays: one kernel for all pieces of a map. Does not: each reads and writes its rows once.

Source: memopt's own.
"""

import torch
from torch import Tensor

_WHERE = "int dim, int start, int channel"
for _schema in (
    "take_rows(Tensor x, int dim, int start, int end) -> Tensor",
    "take_rows_behind(Tensor rows, Tensor x, int dim, int start, int end) -> Tensor",
    f"put_rows(Tensor x, Tensor rows, {_WHERE}) -> Tensor",
    f"put_rows_(Tensor(a!) x, Tensor rows, {_WHERE}) -> ()",
):
    _name, _rest = _schema.split("(", 1)
    torch.library.define(f"memopt::{_name}", f"({_rest}", tags=(torch.Tag.flexible_layout,))

TAKE = torch.ops.memopt.take_rows.default
TAKE_BEHIND = torch.ops.memopt.take_rows_behind.default
PUT = torch.ops.memopt.put_rows.default
PUT_IN_PLACE = torch.ops.memopt.put_rows_.default


def _take(x: Tensor, dim: int, start: int, end: int) -> Tensor:
    """A copy of ``x`` from ``start`` to before ``end``, dense in the same order of dimensions."""
    return x.narrow(dim, start, end - start).clone()


def _take_behind(rows: Tensor, x: Tensor, dim: int, start: int, end: int) -> Tensor:
    """``rows``, and behind them ``x`` from ``start`` to before ``end``."""
    return torch.cat([rows, x.narrow(dim, start, end - start)], dim)


def _put(x: Tensor, rows: Tensor, dim: int, start: int, channel: int) -> Tensor:
    """``x`` with other rows from ``start`` on, and there in the channels from ``channel`` on."""
    changed = x.clone()
    _put_in_place(changed, rows, dim, start, channel)
    return changed


def _put_in_place(x: Tensor, rows: Tensor, dim: int, start: int, channel: int) -> None:
    place = x.narrow(dim, start, rows.shape[dim])
    if rows.dim() > 1 and rows.shape[1] != place.shape[1]:
        place = place.narrow(1, channel, rows.shape[1])
    place.copy_(rows)


for _name, _function in (
    ("take_rows", _take),
    ("take_rows_behind", _take_behind),
    ("put_rows", _put),
    ("put_rows_", _put_in_place),
):
    torch.library.impl(f"memopt::{_name}", "default", _function)
    torch.library.register_fake(f"memopt::{_name}", _function)
