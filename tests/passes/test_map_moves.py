"""Rows of maps that move: where they go, and in which layout."""

from typing import Any

import pytest
import torch
from torch import Tensor, fx

from memopt._torch import FakeTensorMode
from memopt.graph import aten
from memopt.kernels.map_rows import KEEP, PUT
from memopt.passes.joint_nodes import call
from memopt.passes.map_moves import empty, part, put, take, write_in_place


def test_rows_go_to_their_channels_of_the_very_map() -> None:
    def move(x: Tensor, dim: int) -> Any:
        graph = fx.Graph()
        gm = fx.GraphModule({}, graph)
        given = graph.placeholder("x")
        given.meta["val"] = FakeTensorMode().from_tensor(x)
        rows = take(given, dim, 2, 5, like=given)
        part = call(graph, aten.slice.Tensor, rows, 1, 0, 2, like=rows)
        more = call(graph, aten.add.Scalar, part, 1, like=part)
        graph.output(put(given, more, dim, 1, channel=1, like=given))
        write_in_place(graph)
        gm.recompile()
        return gm(x)

    for layout in (torch.contiguous_format, torch.channels_last):
        for dim in (2, 3):
            x = torch.randn(2, 3, 8, 5).to(memory_format=layout)
            expected = x.clone()
            expected.narrow(dim, 1, 3)[:, 1:] = x.narrow(dim, 2, 3)[:, :2] + 1
            assert move(x, dim) is x
            assert torch.equal(x, expected)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dim", [0, 2])
def test_values_in_one_map_are_dense_in_their_rows(dim: int, layout: Any) -> None:
    graph = fx.Graph()
    like = torch.empty(2, 6, 4, 5).to(memory_format=layout)
    with FakeTensorMode() as mode:
        origin = graph.placeholder("x")
        origin.meta["val"] = mode.from_tensor(like)
        map_ = empty(origin, torch.empty_like(origin.meta["val"]))
        parts = [part(map_, dim, 0, 2, like=origin), part(map_, dim, 2, 4, like=origin)]
    graph.output([map_, *parts])
    whole, few, many = fx.GraphModule({}, graph)(like)
    for number, value in enumerate((few, many)):
        value.copy_(torch.full_like(value, number))
        row = value[0, :, 0] if dim == 2 else value[0]
        if dim == 0 or layout is torch.channels_last:  # all channels of a row lie together
            assert row.is_contiguous() or row.movedim(0, -1).is_contiguous()
    assert few.eq(0).all()
    assert many.eq(1).all()
    for rows in whole.unbind(dim):
        assert rows.sum() == many.select(dim, 0).numel()  # nothing beyond its own row


def test_rows_are_kept_in_the_layout_that_is_asked_for() -> None:
    x = torch.randn(2, 3, 8, 5)
    rows = KEEP(x[:, :, 2:5], torch.channels_last)
    assert torch.equal(rows, x[:, :, 2:5])
    assert rows.is_contiguous(memory_format=torch.channels_last)


def test_put_rows_leaves_the_map_as_it_was() -> None:
    x, rows = torch.randn(2, 3, 8, 5), torch.randn(2, 2, 3, 5)
    before = x.clone()
    changed = PUT(x, rows, 2, 4, 1)
    assert torch.equal(x, before)
    before[:, 1:, 4:7] = rows
    assert torch.equal(changed, before)
