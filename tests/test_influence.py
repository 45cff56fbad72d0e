"""Influence is what the loss would change by, to first order, if an entry were left out."""

import pytest
import torch
from torch import Tensor

from bench.meter import Meter
from memopt.attention import influence
from memopt.attention.influence import pooled, shares

HEADS, GROUP, LENGTH, WIDTH = 2, 2, 13, 8


def drawn(batch: int = 1) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    q = torch.randn(batch, HEADS * GROUP, LENGTH, WIDTH)
    k, v = torch.randn(2, batch, HEADS, LENGTH, WIDTH)
    return q, k, v, torch.randn_like(q)


def attended(q: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> Tensor:
    k, v = (x.repeat_interleave(GROUP, 1) for x in (k, v))
    return (q @ k.mT * 0.5).masked_fill(~seen, -torch.inf).softmax(-1) @ v


def one_by_one(q: Tensor, k: Tensor, v: Tensor, gradient: Tensor) -> Tensor:
    """Each entry left out in turn: how much the loss changes, by its gradient."""
    q, k, v, gradient = (x.double() for x in (q, k, v, gradient))
    causal = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()
    whole = attended(q, k, v, causal)
    found = torch.zeros(HEADS, LENGTH, LENGTH, dtype=torch.float64)
    for i in range(1, LENGTH):  # the first query sees one key alone
        for j in range(i + 1):
            seen = causal.clone()
            seen[i, j] = False
            change = (attended(q, k, v, seen)[:, :, i] - whole[:, :, i]) * gradient[:, :, i]
            found[:, i, j] = change.sum(-1).abs().view(-1, HEADS, GROUP).sum((0, 2))
    return found


@pytest.mark.parametrize("batch", [1, 3])
def test_influence_is_that_of_leaving_an_entry_out(batch: int) -> None:
    given = drawn(batch)
    torch.testing.assert_close(pooled(*given, 0.5, 1), one_by_one(*given), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("block", [2, 4, 5, 13, 64])
def test_blocks_hold_the_sums_of_their_entries(block: int) -> None:
    given = drawn()
    entries = pooled(*given, 0.5, 1)
    blocks = -(-LENGTH // block)
    expected = torch.zeros(HEADS, blocks, blocks, dtype=torch.float64)
    for i in range(LENGTH):
        for j in range(LENGTH):
            expected[:, i // block, j // block] += entries[:, i, j]
    torch.testing.assert_close(pooled(*given, 0.5, block), expected, rtol=1e-5, atol=1e-5)


def test_pieces_of_the_queries_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    given = drawn()
    whole = pooled(*given, 0.5, 4)
    monkeypatch.setattr(influence, "_CHUNK_BYTES", 1)
    torch.testing.assert_close(pooled(*given, 0.5, 4), whole, rtol=1e-5, atol=1e-5)


def test_no_map_is_held_as_a_whole() -> None:
    n, heads, block = 2048, 8, 64
    q, k, v, gradient = torch.randn(4, 1, heads, n, 8)
    with Meter("cpu") as meter:
        pooled(q, k, v, gradient, 0.5, block)
    one_map = heads * n * n * 4
    assert meter.peak_bytes < one_map  # with half a dozen temporaries of its size, but for pieces


def test_an_entry_that_is_all_of_its_row_is_finite() -> None:
    q, k, v, gradient = drawn()
    assert pooled(q * 1e3, k * 1e3, v, gradient, 0.5, 4).isfinite().all()


@pytest.mark.parametrize("block", [1, 3, 4])
def test_shares_count_what_lies_outside_of_a_span(block: int) -> None:
    blocks, spans = 5, list(range(1, 25))
    actual = shares(block, torch.tensor(spans), blocks)
    for span, row in zip(spans, actual.tolist(), strict=True):
        for offset, share in enumerate(row):
            apart = [offset * block + i - j for i in range(block) for j in range(block)]
            there = [a for a in apart if a >= 0]
            assert share == pytest.approx(sum(a >= span for a in there) / len(there))
