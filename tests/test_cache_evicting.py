"""Of a prompt the tokens are kept that its end attends to most, and the others are freed."""

import gc
import itertools
import weakref
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from memopt import cache as caches
from memopt.cache import EvictingCache, HeadLayer, KeptStore, pyramid
from memopt.cache.evicting import NEAR
from memopt.errors import ConfigError
from tests.cache_models import HEADS, LAYERS, by_transformers, generated, prompts, tiny
from tests.cache_steps import SCALE, Tokens, causal_mask, dense, fed
from tests.references import assert_equal_in_float64

LENGTH = 64


def chosen(tokens: Tokens, kept: int, observed: int) -> list[list[set[int]]]:
    """For each sequence and head the tokens to keep, written out: all queries' attention first."""
    n, group = tokens.real.shape[1], tokens.q.shape[1] // tokens.k.shape[1]
    keys = tokens.k.repeat_interleave(group, 1)
    hidden = ~causal_mask(tokens).repeat_interleave(group, 1)
    shares = (tokens.q @ keys.transpose(2, 3) * SCALE).masked_fill(hidden, -torch.inf).softmax(-1)
    sets = []
    for b in range(len(tokens.q)):
        heads = []
        for h in range(tokens.k.shape[1]):
            mass = shares[b, h * group : (h + 1) * group, n - observed :].sum((0, 1))
            older = range(n - observed)
            best = {
                t: (max(mass[s].item() for s in older if abs(s - t) <= NEAR // 2), mass[t].item())
                for t in older
                if tokens.real[b, t]
            }
            heads.append(set(sorted(best, key=best.__getitem__, reverse=True)[:kept]))
        sets.append(heads)
    return sets


def held(store: KeptStore, tokens: Tokens, b: int, h: int) -> set[int]:
    """Which tokens a head holds, by their keys."""
    places = {tuple(key): at for at, key in enumerate(tokens.k[b, h].tolist())}
    return {places[tuple(key)] for key in store.keys[b, h][store.is_held[b]].tolist()}


@pytest.mark.parametrize("padding", [(0, 0), (5, 0), (30, 0)])
def test_tokens_are_kept_that_the_last_queries_attend_to(padding: tuple[int, int]) -> None:
    tokens = Tokens.drawn(40, 2, 3, padding=padding)
    store = KeptStore(11, 8, 4)
    fed(HeadLayer([([0, 1], store)], LENGTH), tokens, [40])
    for b, heads in enumerate(chosen(tokens, 11, 4)):
        for h, expected in enumerate(heads):
            assert held(store, tokens, b, h) == expected | set(range(36, 40))


def test_later_tokens_see_what_is_held_and_no_more() -> None:
    """The ring included, which lets go of its oldest when it is full."""
    n, later, kept, ring, observed = 30, 9, 7, 6, 4
    tokens = Tokens.drawn(n + later, 2, 2, padding=(3, 0))
    prompt = tokens.at(slice(0, n))
    visible = causal_mask(tokens).clone()
    for b, heads in enumerate(chosen(prompt, kept, observed)):
        for h, best in enumerate(heads):
            for i in range(n, n + later):
                newest = range(max(n - observed, i + 1 - ring), i + 1)
                for j in range(i + 1):
                    visible[b, h, i, j] = j in best or j in newest
    store = KeptStore(kept, ring, observed)
    got = fed(HeadLayer([([0, 1], store)], LENGTH), tokens, [n, *[1] * later])
    expected = dense(tokens, visible)
    assert_equal_in_float64([got * tokens.is_query], [expected * tokens.is_query])


def test_a_second_prompt_sees_what_was_held_and_chooses_again() -> None:
    """Of what was held and of its own tokens: what it does not look at is freed as well."""
    tokens = Tokens.drawn(40, 1, 1, padding=(0,))
    store = KeptStore(5, 8, 4)
    layer = HeadLayer([([0], store)], LENGTH)
    mask = torch.nn.functional.pad(tokens.real, (0, LENGTH - 40))
    results = []
    for at in (slice(0, 24), slice(24, 40)):
        before = held(store, tokens, 0, 0) if at.start else set()
        pending, _ = layer.update(tokens.k[:, :, at], tokens.v[:, :, at])
        results.append(layer.attend(tokens.q[:, :, at], pending, mask, SCALE))
    visible = causal_mask(tokens).clone()
    visible[:, :, 24:, :24] = torch.tensor([j in before for j in range(24)])
    assert_equal_in_float64([torch.cat(results, 2)], [dense(tokens, visible)])
    seen = sorted(before | set(range(24, 40)))
    rest = tokens.at(seen)
    ((expected,),) = chosen(rest, 5, 4)
    # the order in which tokens lie decides who their neighbours are, so the sets may differ there
    assert len(held(store, tokens, 0, 0)) == len(expected) + 4
    assert held(store, tokens, 0, 0) <= set(seen)


def test_keys_of_evicted_tokens_are_freed() -> None:
    tokens = Tokens.drawn(40, 2)
    store = KeptStore(5, 8, 4)
    layer = HeadLayer([([0, 1], store)], LENGTH)
    k, v = tokens.k.clone(), tokens.v.clone()
    alive: list[Any] = [weakref.ref(x) for x in (k, v, k.untyped_storage())]
    layer.attend(tokens.q, layer.update(k, v)[0], None, SCALE)
    del k, v
    gc.collect()
    assert [ref() for ref in alive] == [None] * 3
    cache = caches.HeadCache([layer])
    assert cache.held_bytes() == cache.bytes_for(2, (8, 10), torch.float64)
    numbers = 2 * 2 * (5 + 8) * (8 + 10)
    assert sum(x.nbytes for x in (store.keys, store.values)) == numbers * 8


def test_where_all_is_kept_nothing_is_lost() -> None:
    model, inputs = tiny(), prompts()
    expected = by_transformers(model, inputs)
    cache = EvictingCache(model.config, [20, 20], 64, ring=16, observed=4)
    assert torch.equal(generated(model, inputs, cache=cache), expected)
    assert cache.lost_attention() == pytest.approx([0.0, 0.0], abs=1e-6)


def test_the_attention_that_is_told_to_be_lost_is_that_of_evicted_tokens() -> None:
    tokens = Tokens.drawn(40, 2, 3)
    store = KeptStore(11, 8, 4)
    layer = HeadLayer([([0, 1], store)], LENGTH)
    fed(layer, tokens, [40])
    (told,) = EvictingCache.lost_attention(caches.HeadCache([layer]))
    keys = tokens.k.repeat_interleave(3, 1)
    hidden = ~causal_mask(tokens).repeat_interleave(3, 1)
    shares = (tokens.q @ keys.transpose(2, 3) * SCALE).masked_fill(hidden, -torch.inf).softmax(-1)
    gone = [
        shares[
            b, 3 * h : 3 * h + 3, 36:, [t for t in range(40) if t not in held(store, tokens, b, h)]
        ]
        for b in range(2)
        for h in range(2)
    ]
    expected = torch.stack([share.sum(-1).mean() for share in gone]).mean()
    torch.testing.assert_close(told, expected.item(), rtol=1e-5, atol=1e-6)
    assert told > 0.1


def test_scores_of_large_numbers_are_numbers_in_fp16() -> None:
    """Products of 8 numbers of 150 and 150 do not fit in it, and their scaled ones do."""
    drawn = Tokens.drawn(40, 2, dtype=torch.float32)
    tokens = Tokens(drawn.q.sign() * 150, drawn.k.sign() * 150, drawn.v, drawn.real)
    assert 8 * 150**2 > torch.finfo(torch.float16).max > 8 * 150**2 * SCALE
    store = KeptStore(6, 8, 4)
    fed(HeadLayer([([0, 1], store)], LENGTH), tokens.to(torch.float16), [40])
    assert 0 <= store.lost.item() <= 1


def test_heads_may_keep_different_numbers() -> None:
    cache = EvictingCache(tiny().config, [[3, 9], [4, 4]], 64, ring=8, observed=4)
    rooms = [[s.kept for s in layer.stores if isinstance(s, KeptStore)] for layer in cache.layers]
    assert rooms == [[3, 9], [4]]


def test_a_models_own_window_is_held_as_it_is() -> None:
    model, inputs = tiny("mistral"), prompts()
    expected = by_transformers(model, inputs)
    cache = EvictingCache(model.config, 4, 64)
    assert torch.equal(generated(model, inputs, cache=cache), expected)


@given(st.integers(1, 5000), st.integers(1, 90), st.floats(1, 50))
def test_a_pyramid_has_its_mean_and_goes_down(mean: int, layers: int, steepness: float) -> None:
    counts = pyramid(mean, layers, steepness)
    assert len(counts) == layers
    assert sum(counts) == mean * layers
    assert all(low <= high + 1 for high, low in itertools.pairwise(counts))
    assert min(counts) >= 0
    if steepness == 1:
        assert set(counts) == {mean}


def test_the_last_layer_gets_the_mean_over_the_steepness() -> None:
    assert pyramid(2000, 32)[-1] == pytest.approx(100, abs=100)
    assert pyramid(2000, 32)[0] == pytest.approx(3900, abs=100)


@pytest.mark.parametrize(
    ("kept", "named", "told"),
    [
        ([4], {}, "kept for"),
        ([[4] * 3] * LAYERS, {}, r"kept for \[3, 3\] heads"),
        ([[4, -1]] * LAYERS, {}, "from 0 on"),
        (0, {}, "pyramid"),
        (4, {"observed": 0}, "observed=0"),
        (4, {"observed": 9, "ring": 8}, "ring=8"),
    ],
)
def test_numbers_that_do_not_fit_are_refused(kept: Any, named: dict[str, int], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        EvictingCache(tiny().config, kept, 64, **named)


def test_a_steepness_below_one_is_refused() -> None:
    with pytest.raises(ConfigError, match="steepness from 1 on"):
        pyramid(10, HEADS, 0.5)
