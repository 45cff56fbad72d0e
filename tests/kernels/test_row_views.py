"""Views that are read as rows, and what it takes to copy those that are not."""

from random import Random

import hypothesis.strategies as st
import torch
from hypothesis import given

from memopt.kernels.row_views import by_rows, copied_bytes


def same_memory(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()


@given(
    sizes=st.lists(st.integers(1, 4), min_size=1, max_size=4),
    order=st.randoms(use_true_random=False),
    cuts=st.lists(st.integers(1, 2), min_size=4, max_size=4),
    expanded=st.booleans(),
)
def test_rows_are_those_of_the_view_and_copied_as_announced(
    sizes: list[int], order: Random, cuts: list[int], expanded: bool
) -> None:
    places = [*range(len(sizes))]
    order.shuffle(places)
    whole = torch.randn([size * cut for size, cut in zip(sizes, cuts, strict=False)])
    view = whole[tuple(slice(size) for size in sizes)].permute(places)
    view = view.expand(2, *view.shape) if expanded else view
    rows = by_rows(view)
    assert torch.equal(rows, view.reshape(-1, view.shape[-1]))
    assert rows.shape[1] == 1 or rows.stride(1) == 1
    assert copied_bytes(view) == (0 if same_memory(rows, view) else view.nbytes)
    dense = view.contiguous()
    assert copied_bytes(view, dense=True) == (0 if same_memory(dense, view) else view.nbytes)
