"""Banded attention against a dense mask: values, gradients, memory, and what it must not see."""

from collections.abc import Callable, Sequence
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
import torch._dynamo
import torch.nn.functional as F
from hypothesis import given, settings
from torch.nn.attention import SDPBackend, sdpa_kernel

from memopt.errors import ConfigError
from memopt.kernels import scratch_table
from memopt.kernels.band_tiles import cut
from memopt.kernels.banded_attention import (
    ATTENTION,
    BANDED_ATTENTION,
    BANDED_ATTENTION_BACKWARD,
)
from tests.references import (
    LOW_PRECISION,
    assert_equal_in_float64,
    assert_within_reference_error,
    band,
    banded_attention,
)
from tests.scratch import assert_scratch_is_within, scratch_of

Tensor = torch.Tensor
Table = tuple[Sequence[int], Sequence[int], float]

# Batch, heads of keys, heads of queries for each, queries, keys, entries of a key, of a value.
SHAPES = {
    "heads": (1, 2, 1, 300, 300, 16, 16),
    "groups": (2, 2, 3, 70, 200, 8, 12),
    "decoding": (2, 2, 2, 1, 900, 32, 32),
    "chunk": (2, 2, 2, 60, 700, 32, 32),
    "many tiles": (1, 2, 1, 900, 1000, 64, 64),
    "short": (3, 1, 4, 7, 7, 8, 8),
    "wide": (1, 1, 2, 20, 130, 256, 256),
}
TABLES = {
    "itself": ([1, 1], [0, 0]),
    "sinks": ([37, 300], [5, 64]),
    "all": ([0, 0], [3, 0]),
    "mixed": ([100, 0], [0, 0]),
    "overlapping": ([64, 20], [70, 1]),
    "longer than the sequence": ([1300, 999], [0, 900]),
}


def draw(shape: Sequence[int]) -> tuple[list[Tensor], Tensor]:
    """Queries, keys and values, of the layout that projections give, and a gradient."""
    batch, heads, group, queries, keys, width, depth = shape
    sizes = (queries, heads * group, width), (keys, heads, width), (keys, heads, depth)
    inputs = [torch.randn(batch, *size).double().transpose(1, 2) for size in sizes]
    return inputs, torch.randn(batch, heads * group, queries, depth).double()


def table(name: str, heads: int) -> Table:
    spans, sinks = TABLES[name]
    return spans[:heads], sinks[:heads], 0.3


def run(
    attention: Callable[..., Any], inputs: Sequence[Tensor], dout: Tensor, *arguments: Any
) -> list[Tensor]:
    """The result, its log-sum-exp, and gradients, in the dtype of the inputs."""
    leaves = [t.detach().requires_grad_() for t in inputs]
    out, lse = attention(*leaves, *arguments)
    gradients = torch.autograd.grad(out, leaves, dout.to(out.dtype))
    return [out.detach(), lse.detach(), *gradients]


def library(q: Tensor, k: Tensor, v: Tensor, spans: Any, sinks: Any, scale: float) -> Any:
    """PyTorch's own tiles, in this dtype and under a dense mask."""
    mask, group = band(q, k, spans, sinks), q.shape[1] // k.shape[1]
    lse = banded_attention(q, k, v, spans, sinks, scale)[1]
    k, v = (t.repeat_interleave(group, 1) for t in (k, v))
    bias = torch.zeros(mask.shape, dtype=q.dtype).masked_fill(~mask, -torch.inf)[None]
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=scale)
    return out, lse


@pytest.mark.parametrize("name", TABLES)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_in_float64_it_is_attention_under_a_dense_mask(shape: Any, name: str) -> None:
    inputs, dout = draw(shape)
    arguments = table(name, shape[1])
    mine = run(ATTENTION, inputs, dout, *arguments)
    assert_equal_in_float64(mine, run(banded_attention, inputs, dout, *arguments))


@pytest.mark.parametrize("dtype", LOW_PRECISION, ids=str)
@pytest.mark.parametrize("name", [*TABLES][1:])  # with one key, the library's gradients are 0
@pytest.mark.parametrize("shape", ["heads", "chunk", "many tiles"])
def test_in_other_dtypes_it_is_as_exact_as_the_library(
    shape: str, name: str, dtype: torch.dtype
) -> None:
    inputs, dout = draw(SHAPES[shape])
    inputs, dout = [t.to(dtype) for t in inputs], dout.to(dtype)
    arguments = table(name, SHAPES[shape][1])
    exact = run(banded_attention, [t.double() for t in inputs], dout.double(), *arguments)
    mine = run(ATTENTION, inputs, dout, *arguments)
    assert [t.dtype for t in mine] == [dtype, torch.float32, dtype, dtype, dtype]
    assert_within_reference_error(mine, exact, run(library, inputs, dout, *arguments))


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_any_table_is_attention_under_its_mask(data: st.DataObject) -> None:
    def number(low: int, high: int) -> int:
        return data.draw(st.integers(low, high))

    heads, keys = number(1, 4), number(1, 160)
    shape = number(1, 2), heads, number(1, 3), number(1, keys), keys, number(1, 9), number(1, 9)
    rules = [(number(0, keys + 2), number(0, keys + 2)) for _ in range(heads)]
    inputs, dout = draw(shape)
    arguments = [span for span, _ in rules], [first for _, first in rules], 0.5
    mine = run(ATTENTION, inputs, dout, *arguments)
    assert_equal_in_float64(mine, run(banded_attention, inputs, dout, *arguments))


def test_gradients_are_those_of_small_differences() -> None:
    inputs, _ = draw((1, 2, 2, 3, 5, 2, 3))
    leaves = tuple(t.requires_grad_() for t in inputs)
    assert torch.autograd.gradcheck(lambda *a: ATTENTION(*a, [2, 0], [1, 0], 0.7)[0], leaves)


def test_a_query_sees_no_later_key_and_none_behind_its_span() -> None:
    (q, k, v), _ = draw((1, 1, 1, 700, 700, 16, 16))
    table = [100], [3], 0.3
    before = ATTENTION(q, k, v, *table)[0]
    for place in (3, 350, 699):
        k2, v2 = k.clone(), v.clone()
        k2[:, :, place] = v2[:, :, place] = 1e6
        changed = (ATTENTION(q, k2, v2, *table)[0] != before).any(-1)[0, 0].nonzero()[:, 0]
        assert changed.min() >= place
        assert changed.max() < place + 100


def test_scores_far_below_those_of_hidden_keys_are_not_lost() -> None:
    (q, k, v), _ = draw((1, 1, 1, 300, 300, 8, 8))
    q, k = q.float(), k.float()
    q[:] = 1.0
    k[:, :, ::2] = 1e3  # hidden from every other query of a span of 1
    out, lse = ATTENTION(q, k, v.float(), [1], [0], 1.0)
    torch.testing.assert_close(out, v.float())
    torch.testing.assert_close(lse, (q * k).sum(-1))


@pytest.mark.parametrize("layout", ["by head", "by token", "entries apart", "expanded"])
def test_inputs_of_any_layout_give_the_same_and_gradients_have_it(layout: str) -> None:
    inputs, dout = draw((2, 2, 2, 30, 30, 8, 8))
    q, k, v = [t.contiguous() for t in inputs]
    arguments = [9, 0], [2, 0], 0.3
    exact = run(ATTENTION, [q, k, v], dout, *arguments)
    if layout == "by token":
        q, k, v = (t.transpose(1, 2).contiguous().transpose(1, 2) for t in (q, k, v))
    elif layout == "entries apart":
        q, k, v = (t.mT.contiguous().mT for t in (q, k, v))
    elif layout == "expanded":
        dout = dout[:1, :, :1, :1].expand_as(dout)
        exact = run(banded_attention, [q, k, v], dout, *arguments)
    found = run(ATTENTION, [q, k, v], dout, *arguments)
    assert_equal_in_float64(found, exact)
    assert [t.stride() for t in found[2:]] == [t.stride() for t in (q, k, v)]
    assert found[0].transpose(1, 2).is_contiguous()


def test_nothing_is_saved_but_what_there_is_and_the_log_sum_exp() -> None:
    saved: list[Tensor] = []

    def keep(t: Tensor) -> Tensor:
        saved.append(t)
        return t

    inputs, _ = draw((1, 2, 2, 30, 30, 8, 8))
    leaves = [t.requires_grad_() for t in inputs]
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        out, lse = ATTENTION(*leaves, [9, 0], [2, 0], 0.3)
    assert {t.data_ptr() for t in saved} == {t.data_ptr() for t in (*leaves, out, lse)}
    assert out.requires_grad
    assert not lse.requires_grad


def test_autocast_leaves_its_sums_alone() -> None:
    inputs, dout = draw((1, 1, 1, 100, 100, 64, 64))
    inputs, dout = [t.float() for t in inputs], dout.float()
    exact = run(ATTENTION, inputs, dout, [30], [0], 0.3)
    with torch.autocast("cpu", torch.bfloat16):
        found = run(ATTENTION, inputs, dout, [30], [0], 0.3)
    assert all(torch.equal(a, b) for a, b in zip(found, exact, strict=True))


def test_one_graph_serves_all_lengths_with_spans_that_follow_them() -> None:
    def model(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        span = k.shape[2] // 2
        return torch.ops.memopt.banded_attention(q, k, v, [span, 0], [2, 0], 0.3)[0]  # type: ignore[no-any-return]

    compiled = torch.compile(model, backend="aot_eager", dynamic=True, fullgraph=True)
    torch._dynamo.reset()
    with torch._dynamo.config.patch(error_on_recompile=True):
        for length in (40, 64, 130):
            inputs, dout = draw((2, 2, 2, length, length, 8, 8))
            mine = run(lambda *a: (compiled(*a), a[0]), inputs, dout)
            exact = run(banded_attention, inputs, dout, [length // 2, 0], [2, 0], 0.3)
            assert_equal_in_float64([mine[0], *mine[2:]], [exact[0], *exact[2:]])


# Longer than any tile, so that formulas that grow with a sequence would be seen.
LARGE = {
    "heads": ((1, 2, 1, 2000, 2000, 64, 64), [300, 0], [64, 0]),
    "groups": ((2, 1, 4, 1000, 1000, 64, 32), [200], [10]),
    "decoding": ((4, 2, 4, 1, 5000, 64, 64), [900, 0], [4, 0]),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", LARGE)
def test_it_allocates_tiles_and_says_how_many_bytes(name: str, dtype: torch.dtype) -> None:
    shape, spans, sinks = LARGE[name]
    inputs, dout = draw(shape)
    q, k, v, dout = (t.to(dtype) for t in (*inputs, dout))
    arguments = spans, sinks, 0.125
    assert_scratch_is_within(BANDED_ATTENTION, q, k, v, *arguments)
    out, lse = ATTENTION(q, k, v, *arguments)
    backward = dout, q, k, v, out, lse, *arguments
    assert_scratch_is_within(BANDED_ATTENTION_BACKWARD, *backward)
    table = scratch_table()
    assert table["memopt.banded_attention"](q, k, v, *arguments) < 3 * 2**20
    assert scratch_of(lambda: ATTENTION(q, k, v, *arguments)) > 2**17  # the meter sees tiles


def test_pieces_are_all_of_it_in_order_and_aligned() -> None:
    parts = [slice(0, 64), slice(90, 90), slice(100, 300)]
    assert [*cut(parts, 128)] == [
        [slice(0, 64), slice(100, 164)],
        [slice(164, 292)],
        [slice(292, 300)],
    ]
    assert [*cut([slice(4, 4)], 7)] == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.randn(4, 8, 16)}, "allowed are"),
        ({"v": torch.randn(1, 2, 9, 16)}, "allowed are"),
        ({"q": torch.randn(1, 3, 8, 16)}, "3 heads of queries: allowed is a multiple of 2"),
        ({"q": torch.randn(1, 4, 11, 16)}, "11 queries of 10 keys"),
        ({"v": torch.randn(1, 2, 10, 16).double()}, "k is torch.float32 and v torch.float64"),
        ({"v": torch.randn(1, 2, 10, 257)}, "at most 256 entries"),
        ({"spans": [3]}, "1 spans and 2 numbers of sinks"),
        ({"spans": [3, -1]}, "span of -1: allowed is a number of keys from 0 on"),
        ({"sinks": [-2, 0]}, "sinks of -2"),
    ],
)
def test_what_is_no_banded_attention_is_an_error(change: dict[str, Any], message: str) -> None:
    good = {
        "q": torch.randn(1, 4, 8, 16),
        "k": torch.randn(1, 2, 10, 16),
        "v": torch.randn(1, 2, 10, 16),
        "spans": [3, 0],
        "sinks": [1, 0],
    }
    with pytest.raises(ConfigError, match=message):
        ATTENTION(*(good | change).values(), 0.25)


@pytest.mark.parametrize(("batch", "queries", "keys"), [(0, 5, 5), (1, 0, 5), (1, 0, 0)])
def test_nothing_in_gives_nothing_out(batch: int, queries: int, keys: int) -> None:
    inputs, dout = draw((batch, 2, 2, queries, keys, 8, 8))
    found = run(ATTENTION, inputs, dout, [2, 0], [0, 0], 0.3)
    assert [t.shape for t in found[2:]] == [t.shape for t in inputs]
    assert not any(gradient.any() for gradient in found[2:])
