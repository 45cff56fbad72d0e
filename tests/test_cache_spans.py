"""Heads with spans see what a dense mask would show them, and hold no more than that."""

from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from memopt import cache as caches
from memopt.cache import FullStore, HeadLayer, HeadSpanCache, QuantizedStore, Stage, WindowStore
from memopt.errors import ConfigError
from tests.cache_models import HEADS, LAYERS, generated, prompts, tiny
from tests.cache_steps import SCALE, Tokens, causal_mask, dense, fed, span_mask
from tests.references import assert_equal_in_float64, assert_within_reference_error

SPANS = (None, 5, 3, 5)
SINKS = 2
LENGTH = 40


def layer(sinks: int = SINKS) -> HeadLayer:
    """Four heads, of which two have the same span."""
    groups = [
        ([0], FullStore(LENGTH)),
        ([1, 3], WindowStore(5, sinks)),
        ([2], WindowStore(3, sinks)),
    ]
    return HeadLayer(groups, LENGTH)


@given(
    sizes=st.lists(st.integers(1, 12), min_size=1, max_size=6),
    padding=st.lists(st.integers(0, 9), min_size=1, max_size=3),
    sinks=st.integers(0, 4),
    group=st.integers(1, 3),
    masked=st.booleans(),
)
def test_attention_is_that_of_a_dense_mask(
    sizes: list[int], padding: list[int], sinks: int, group: int, masked: bool
) -> None:
    """Prompts and tokens in any order, of sequences that start at different places."""
    n = min(sum(sizes), LENGTH)
    sizes = [min(size, n - sum(sizes[:at])) for at, size in enumerate(sizes)]
    sizes = [size for size in sizes if size > 0]
    tokens = Tokens.drawn(n, 4, group, padding=padding if masked else [0] * len(padding))
    expected = dense(tokens, span_mask(tokens, SPANS, sinks))
    got = fed(layer(sinks), tokens, sizes, masked)
    assert got.isfinite().all()
    assert_equal_in_float64([got * tokens.is_query], [expected * tokens.is_query])


@given(real=st.lists(st.booleans(), min_size=24, max_size=24), first=st.integers(2, 20))
def test_padding_may_lie_anywhere(real: list[bool], first: int) -> None:
    """As between the turns of conversations of different lengths."""
    tokens = Tokens.drawn(24, 4, 1, padding=(0, 3))
    tokens.real[0] = torch.tensor(real)
    expected = dense(tokens, span_mask(tokens, SPANS, SINKS))
    got = fed(layer(), tokens, [first, 1, 23 - first])
    assert_equal_in_float64([got * tokens.is_query], [expected * tokens.is_query])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision_is_as_near_as_a_dense_mask_in_it(dtype: torch.dtype) -> None:
    """Scores and sums of SDPA are in float32, so plain code is given them in float32 too."""
    exact, plain, got = [], [], []
    for _ in range(5):
        tokens = Tokens.drawn(32, 4, 2, padding=(4, 0), dtype=dtype)
        mask = span_mask(tokens, SPANS, SINKS)
        exact.append(dense(tokens.to(torch.float64), mask) * tokens.is_query)
        plain.append(dense(tokens, mask) * tokens.is_query)
        got.append(fed(layer(), tokens, [20, 1, 1, 9, 1]) * tokens.is_query)
    stacked = [[torch.stack(results)] for results in (got, exact, plain)]
    assert_within_reference_error(stacked[0], stacked[1], stacked[2])


def test_what_comes_later_changes_nothing_before_it() -> None:
    tokens = Tokens.drawn(30, 4, padding=(3, 0))
    changed = Tokens(*(x.clone() for x in (tokens.q, tokens.k, tokens.v, tokens.real)))
    for x in (changed.k, changed.v):
        x[:, :, 17:] = 100 * torch.randn_like(x[:, :, 17:])
    before = fed(layer(), tokens, [12, 1, 9, 8])[:, :, :17]
    assert torch.equal(fed(layer(), changed, [12, 1, 9, 8])[:, :, :17], before)


def test_a_token_beyond_the_span_is_gone() -> None:
    tokens = Tokens.drawn(30, 1, 1, padding=(0,))
    only = HeadLayer([([0], WindowStore(5, SINKS))], LENGTH)
    fed(only, tokens, [30])
    held = only.stores[0].tensors()[0][0, 0]
    kept = [*range(SINKS), *range(25, 30)]
    assert sorted(map(tuple, held.tolist())) == sorted(map(tuple, tokens.k[0, 0, kept].tolist()))


def test_a_mask_of_more_rows_than_exist_at_once_is_no_different(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tokens = Tokens.drawn(36, 4, padding=(5, 0))
    whole = fed(layer(), tokens, [30, 6])
    monkeypatch.setattr("memopt.cache.rows.ROWS", 7)
    assert_equal_in_float64([fed(layer(), tokens, [30, 6])], [whole])


def test_without_spans_attention_is_causal() -> None:
    tokens = Tokens.drawn(20, 2, padding=(0, 6))
    got = fed(HeadLayer([([0, 1], FullStore(LENGTH))], LENGTH), tokens, [11, 1, 8])
    expected = dense(tokens, causal_mask(tokens))
    assert_equal_in_float64([got * tokens.is_query], [expected * tokens.is_query])


def test_heads_may_stand_in_any_order() -> None:
    tokens = Tokens.drawn(20, 4)
    shuffled = HeadLayer([([3, 1], WindowStore(5, SINKS)), ([2, 0], FullStore(LENGTH))], LENGTH)
    got = fed(shuffled, tokens, [12, 1, 7])
    assert_equal_in_float64([got], [dense(tokens, span_mask(tokens, (None, 5, None, 5), SINKS))])


def test_grouped_queries_are_not_expanded(monkeypatch: pytest.MonkeyPatch) -> None:
    """No key has another one's memory, and none is there twice."""
    seen: list[tuple[Any, Any]] = []
    plain = torch.nn.functional.scaled_dot_product_attention

    def noted(q: torch.Tensor, k: torch.Tensor, *rest: Any, **named: Any) -> torch.Tensor:
        seen.append((k.shape, k.stride()))
        return plain(q, k, *rest, **named)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", noted)
    fed(layer(), Tokens.drawn(30, 4, group=3), [28, 1, 1])
    assert {shape[1] for shape, _ in seen} == {1, 2}
    assert all(0 not in stride for _, stride in seen)


def test_heads_of_one_span_share_buffers_and_long_spans_are_full() -> None:
    config = tiny().config
    spans: list[list[int | None]] = [[6, 6], [None, 62]]
    cache = HeadSpanCache(config, spans, 64, sinks=[0, 2])
    first, second = cache.layers
    assert [type(store) for store in first.stores] == [WindowStore]
    assert [type(store) for store in second.stores] == [FullStore]


def test_a_models_own_window_bounds_every_span() -> None:
    config = tiny("gemma3").config
    cache = HeadSpanCache(config, [[None, 4], [None, 4]], 64)
    stores = {(s.span, s.sinks) for s in cache.layers[0].stores if isinstance(s, WindowStore)}
    assert stores == {(9, 0), (4, 0)}


def test_spans_generate_what_a_dense_mask_does() -> None:
    """The whole model, token by token, beside one that recomputes everything under a mask."""
    model = caches.prepare(tiny())
    spans: list[list[int | None]] = [[None, 4], [3, 6]]
    inputs = prompts(padding=(5, 0))
    cache = HeadSpanCache(model.config, spans, 64, sinks=1)
    ids = generated(model, inputs, cache=cache)
    again = HeadSpanCache(model.config, spans, 64, sinks=1)
    mask = torch.nn.functional.pad(inputs["attention_mask"], (0, 12), value=1)
    position = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        logits = model(ids, attention_mask=mask, position_ids=position, cache=again).logits
    assert torch.equal(logits[:, 19:-1].argmax(-1), ids[:, 20:])


@pytest.mark.parametrize(
    "full", [partial(QuantizedStore, bits=8, group=4), Stage().store], ids=["8 bits", "host"]
)
def test_heads_without_a_span_may_be_held_in_another_form(full: Any) -> None:
    model = caches.prepare(tiny())
    plain = HeadSpanCache(model.config, [[None, 4]] * LAYERS, 64)
    other = HeadSpanCache(model.config, [[None, 4]] * LAYERS, 64, full=full)
    inputs = prompts()
    with torch.no_grad():
        for cache in (plain, other):
            model(**inputs, cache=cache)
        token = torch.tensor([[3], [4]])
        mask = torch.nn.functional.pad(inputs["attention_mask"], (0, 1), value=1)
        expected = model(token, attention_mask=mask, cache=plain).logits
        got = model(token, attention_mask=mask, cache=other).logits
    assert (got - expected).norm() <= 0.01 * expected.norm()


@pytest.mark.parametrize(
    ("spans", "sinks", "told"),
    [
        ([[None] * HEADS], 4, "2 layers of 2 heads"),
        ([[None] * 3] * LAYERS, 4, r"spans of \[3, 3\] heads"),
        ([[None, 0]] * LAYERS, 4, "span=0"),
        ([[None, 2.5]] * LAYERS, 4, "span=2.5"),
        ([[None, 8]] * LAYERS, -1, r"sinks=\[-1, -1\]"),
        ([[None, 8]] * LAYERS, [1], r"sinks=\[1\].*the 2 layers"),
    ],
)
def test_spans_that_do_not_fit_are_refused(spans: Any, sinks: Any, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        HeadSpanCache(tiny().config, spans, 64, sinks=sinks)


def test_a_head_in_no_group_or_two_is_refused() -> None:
    with pytest.raises(ConfigError, match="each head from 0 on is in one group"):
        HeadLayer([([0, 1], FullStore(8)), ([1], FullStore(8))], 8)


def test_scores_are_scaled_as_the_model_says() -> None:
    assert SCALE != 8**-0.5  # or the tests above would not see a scale that is ignored
