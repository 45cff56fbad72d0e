"""Masks of positions are told at every length, and only those that are causal at each."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx

from memopt.passes.attentions import ATTEND
from memopt.passes.position_masks import is_causal


def told(mask: Callable[[Tensor], Tensor]) -> bool:
    """What is said of a mask that is made for `(B, H, N, D)` whose ``N`` is a symbol."""
    said = []

    def attend(x: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(x, x, x, attn_mask=mask(x))

    def look(gm: fx.GraphModule, _: Any) -> Any:
        (node,) = gm.graph.find_nodes(op="call_function", target=ATTEND)
        said.append(is_causal(node.kwargs["attn_mask"], node))
        return gm.forward

    torch._dynamo.reset()
    x = torch.randn(2, 2, 12, 8)
    torch._dynamo.mark_dynamic(x, 2)
    torch.compile(attend, backend=look)(x)
    return said[0]


def positions(x: Tensor) -> Tensor:
    return torch.arange(x.shape[2])


def by_le(x: Tensor) -> Tensor:
    at = positions(x)
    return at[None, :] <= at[:, None]


def by_ge(x: Tensor) -> Tensor:
    at = positions(x)
    return at.unsqueeze(-1) >= at


def by_lt(x: Tensor) -> Tensor:
    at = positions(x)
    return at[None, None] < at[:, None] + 1


def by_gt(x: Tensor) -> Tensor:
    at = positions(x)
    return (at[..., :, None] - at + 1 > 0)[None, None].expand(2, 1, -1, -1)


def by_arange_of_two(x: Tensor) -> Tensor:
    n = x.shape[2]
    return torch.arange(3, n + 3)[None] <= torch.arange(0, n)[:, None] + 3


def as_in_transformers(x: Tensor) -> Tensor:
    """Positions by which packed sequences are told apart, looked up by index tensors."""
    batch, n = x.shape[0], x.shape[2]
    ids = (positions(x) + 0).unsqueeze(0).expand(batch, -1)
    packed = (torch.diff(ids, prepend=ids[:, :1] - 1, dim=-1) != 1).cumsum(-1)
    b = torch.arange(batch)[:, None, None, None]
    q, k = torch.arange(n)[None, None, :, None], torch.arange(n)[None, None, None, :]
    shown = q.new_ones((), dtype=torch.bool) & (ids[b, k] <= ids[b, q]).to(x.device)
    return (shown & (packed[b, q] == packed[b, k])).expand(batch, -1, n, n)


@pytest.mark.parametrize(
    "mask", [by_le, by_ge, by_lt, by_gt, by_arange_of_two, as_in_transformers]
)
def test_a_causal_mask_is_told(mask: Any) -> None:
    x = torch.randn(2, 2, 12, 8)
    assert bool((mask(x) == torch.ones(12, 12, dtype=torch.bool).tril()).all())
    assert told(mask)


def strictly(x: Tensor) -> Tensor:
    at = positions(x)
    return at[None] < at[:, None]


def early(x: Tensor) -> Tensor:
    at = positions(x)
    return at[None] <= at[:, None] + 1


def upside_down(x: Tensor) -> Tensor:
    at = positions(x)
    return at[None] >= at[:, None]


def wide_window(x: Tensor) -> Tensor:
    """Causal at every length up to 1000."""
    at = positions(x)
    return (at[None] <= at[:, None]) & (at[None] > at[:, None] - 1000)


def by_halves(x: Tensor) -> Tensor:
    at = positions(x) // 2
    return at[None] <= at[:, None]


def twice_as_fast(x: Tensor) -> Tensor:
    at = positions(x)
    return at[None] + at[None] <= at[:, None]


def of_floats(x: Tensor) -> Tensor:
    at = torch.arange(float(x.shape[2]))
    return at[None] <= at[:, None]


def by_steps(x: Tensor) -> Tensor:
    at = torch.arange(0, 2 * x.shape[2], 2)
    return at[None] <= at[:, None]


def from_behind(x: Tensor) -> Tensor:
    at = positions(x)
    return at[at - 1][None] <= at[:, None]


def given(x: Tensor) -> Tensor:
    return by_le(x) & (x[:, :1, :, :1] < 100)


def overwritten(x: Tensor) -> Tensor:
    mask = by_le(x)
    mask[:, 0] = False
    mask[0, 0] = True
    return mask


def whole(x: Tensor) -> Tensor:
    at = positions(x)
    return (at == at)[None].expand(x.shape[2], -1)


def packed(x: Tensor) -> Tensor:
    """Sequences that begin anew at every eighth position."""
    ids = positions(x)
    starts = (torch.diff(ids, prepend=ids[:1]) != 1).cumsum(-1)
    return by_le(x) & (starts[None] == starts[:, None]) & (ids[None] // 8 == ids[:, None] // 8)


def later_than(x: Tensor) -> Tensor:
    at = positions(x)
    return by_le(x)[3:4].expand(x.shape[2], -1) & (at[None] <= at[:, None])


@pytest.mark.parametrize(
    "mask",
    [
        strictly,
        early,
        upside_down,
        wide_window,
        by_halves,
        twice_as_fast,
        of_floats,
        by_steps,
        from_behind,
        given,
        overwritten,
        whole,
        packed,
        later_than,
    ],
)
def test_any_other_mask_is_not(mask: Any) -> None:
    assert not told(mask)
