"""Masks of positions are told at every length, and only those that are causal at each."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx

from memopt.passes.attentions import ATTEND
from memopt.passes.causal_masks import Causal


def seen(mask: Callable[..., Tensor], *more: Tensor) -> Causal | None:
    """What is said of a mask that is made for `(B, H, N, D)` whose ``N`` is a symbol."""
    said = []

    def attend(x: Tensor, *more: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(x, x, x, attn_mask=mask(x, *more))

    def look(gm: fx.GraphModule, _: Any) -> Any:
        (node,) = gm.graph.find_nodes(op="call_function", target=ATTEND)
        said.append(Causal.of(node.kwargs["attn_mask"], node))
        return gm.forward

    torch._dynamo.reset()
    x = torch.randn(2, 2, 12, 8)
    torch._dynamo.mark_dynamic(x, 2)
    torch.compile(attend, backend=look)(x, *more)
    return said[0]


def told(mask: Callable[[Tensor], Tensor]) -> bool:
    """Whether a mask is said to be causal, and no more."""
    return seen(mask) == Causal()


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


def of_bytes(x: Tensor) -> Tensor:
    """What is below zero is 255, and hidden no more."""
    at = torch.arange(x.shape[2], dtype=torch.uint8)
    return at[:, None] - at >= 0


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
        of_bytes,
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


def kept(x: Tensor) -> Tensor:
    """Which tokens of each sequence are none of padding, `(B, N)`."""
    return x[:, 0, :, 0] < 100


def by_broadcast(x: Tensor) -> Tensor:
    return kept(x)[:, None, None, :] & by_le(x)


def by_index(x: Tensor) -> Tensor:
    b, k = torch.arange(x.shape[0])[:, None, None, None], positions(x)[None, None, None, :]
    return (by_le(x)[None, None] & kept(x)[b, k].to(x.device)).expand(x.shape[0], 1, -1, -1)


def of_one_for_all(x: Tensor) -> Tensor:
    return (by_gt(x) & kept(x)[:1, None, None]).contiguous()


@pytest.mark.parametrize("mask", [by_broadcast, by_index, of_one_for_all])
def test_padding_is_told_apart_from_causality(mask: Any) -> None:
    causal = seen(mask)
    assert causal is not None
    assert causal.padding is not None
    assert causal.padding.meta["example_value"].shape[1:3] == (1, 1)


def of_padding_alone(x: Tensor) -> Tensor:
    return kept(x)[:, None, None, :].expand(-1, -1, x.shape[2], -1)


def of_queries_too(x: Tensor) -> Tensor:
    return by_broadcast(x) & kept(x)[:, None, :, None]


def of_heads(x: Tensor) -> Tensor:
    return by_le(x) & (x[..., 0] < 100)[:, :, None, :]


def of_no_batch(x: Tensor) -> Tensor:
    return by_le(x) & kept(x)[:, None, :]


def of_two(x: Tensor) -> Tensor:
    return by_broadcast(x) & (x[:, :1, :, 1] < 100)[:, :, None, :]


def either(x: Tensor) -> Tensor:
    return by_le(x) | kept(x)[:, None, None, :]


def overwritten_padding(x: Tensor) -> Tensor:
    padding = kept(x)[:, None, None, :]
    mask = padding & by_le(x)
    padding.fill_(True)
    return mask


@pytest.mark.parametrize(
    "mask",
    [of_padding_alone, of_queries_too, of_heads, of_no_batch, of_two, either, overwritten_padding],
)
def test_other_masks_of_data_are_not_told(mask: Any) -> None:
    assert seen(mask) is None


@pytest.mark.parametrize("late", [False, True])
def test_padding_may_be_an_input_that_nothing_overwrites(late: bool) -> None:
    padding = torch.ones(2, 1, 1, 12, dtype=torch.bool)
    torch._dynamo.mark_dynamic(padding, 3)

    def mask(x: Tensor, padding: Tensor) -> Tensor:
        shown = by_le(x) & padding
        if late:
            padding.fill_(True)
        return shown

    assert bool(seen(mask, padding)) is not late
