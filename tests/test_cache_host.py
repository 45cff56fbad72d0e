"""Heads pass through two places on the device, and only new tokens go out."""

import itertools
from typing import Any

import pytest
import torch

from memopt import cache as caches
from memopt.cache import HeadLayer, HostCache, HostStore, Stage
from memopt.errors import ConfigError
from tests.cache_models import HEADS, LAYERS, WIDTH, generated, prompts, tiny
from tests.cache_steps import SCALE, Tokens, causal_mask, dense, fed
from tests.references import assert_equal_in_float64

LENGTH = 40


@pytest.mark.parametrize("heads", [1, 2, 3, 9])
@pytest.mark.parametrize("padding", [(0, 0), (6, 0)])
def test_attention_is_that_of_all_heads_at_once(heads: int, padding: tuple[int, int]) -> None:
    """Also where the last group of heads has fewer than there is room for."""
    tokens = Tokens.drawn(30, 4, 2, padding=padding)
    layer = HeadLayer([(range(4), Stage(heads).store(LENGTH))], LENGTH)
    got = fed(layer, tokens, [12, 1, 1, 9, 1, 6])
    expected = dense(tokens, causal_mask(tokens))
    assert_equal_in_float64([got * tokens.is_query], [expected * tokens.is_query])


def test_the_host_has_every_token_and_the_device_two_places() -> None:
    tokens = Tokens.drawn(30, 4, 2)
    store = Stage(1).store(LENGTH)
    fed(HeadLayer([(range(4), store)], LENGTH), tokens, [12, 1, 17])
    assert torch.equal(store.master[0][:, :, :30], tokens.k)
    assert torch.equal(store.master[1][:, :, :30], tokens.v)
    assert [tuple(x.shape) for x in store.tensors()] == [(2, 1, LENGTH, 8), (2, 1, LENGTH, 10)] * 2


def test_only_new_tokens_are_copied_out() -> None:
    tokens = Tokens.drawn(22, 4)
    store = Stage(1).store(LENGTH)
    layer = HeadLayer([(range(4), store)], LENGTH)
    fed(layer, tokens.at(slice(0, 20)), [20])
    marked = [x[:, :, :20].fill_(3.0) for x in store.master]
    pending, _ = layer.update(tokens.k[:, :, 20:21], tokens.v[:, :, 20:21])
    layer.attend(tokens.q[:, :, 20:21], pending, None, 1.0)
    assert all((x == 3.0).all() for x in marked)
    assert torch.equal(store.master[0][:, :, 20], tokens.k[:, :, 20])


def test_the_next_heads_are_always_on_their_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """Over the ends of layers and of steps: one fetch for each take, and one to begin with."""
    model = caches.prepare(tiny())
    cache = HostCache(model.config, 64)
    counts = {"take": 0, "_fetch": 0}
    for name in counts:
        plain = getattr(Stage, name)

        def counted(self: Stage, *args: Any, plain: Any = plain, name: str = name) -> Any:
            counts[name] += 1
            return plain(self, *args)

        monkeypatch.setattr(Stage, name, counted)
    generated(model, prompts(padding=(0, 0)), cache=cache)
    assert counts["take"] == 11 * LAYERS * HEADS
    assert counts["_fetch"] == counts["take"] + 1


def test_a_place_that_is_read_is_not_written(monkeypatch: pytest.MonkeyPatch) -> None:
    """While one is attended over, copies go into the other."""
    stage = Stage(1)
    taken: list[int] = []
    plain = Stage.take

    def noted(self: Stage, *args: Any) -> Any:
        columns, place = plain(self, *args)
        taken.append(place[0].data_ptr())
        assert self.places[self._turn][0].data_ptr() != place[0].data_ptr()
        return columns, place

    monkeypatch.setattr(Stage, "take", noted)
    layer = HeadLayer([(range(3), stage.store(LENGTH))], LENGTH)
    fed(layer, Tokens.drawn(20, 3), [17, 1, 1, 1])
    assert all(one != other for one, other in itertools.pairwise(taken))


def test_bytes_of_the_two_tiers_are_counted_apart() -> None:
    model = caches.prepare(tiny())
    cache = HostCache(model.config, 64)
    generated(model, prompts(), cache=cache)
    one_head = 2 * 64 * 2 * WIDTH * 4
    assert cache.host_bytes() == LAYERS * HEADS * one_head
    assert cache.host_bytes() == cache.stage.arena.held_bytes
    counters = sum(x.nbytes for layer in cache.layers for x in layer.tensors() if x.dim() < 4)
    assert cache.held_bytes() == 2 * one_head + counters
    assert cache.held_bytes() == cache.bytes_for(2, WIDTH, torch.float32)


def test_keys_of_a_prompt_are_not_held_on_the_device() -> None:
    tokens = Tokens.drawn(20, 4)
    store = Stage(1).store(LENGTH)
    fed(HeadLayer([(range(4), store)], LENGTH), tokens, [20])
    held = [x for x in vars(store).values() if isinstance(x, torch.Tensor | tuple)]
    assert held == [store.master]


def test_compiled_code_breaks_around_it_and_computes_the_same() -> None:
    tokens = Tokens.drawn(16, 2)
    layer = HeadLayer([(range(2), Stage(1).store(LENGTH))], LENGTH)
    assert not layer.is_compileable

    def step(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return layer.attend(q + 0, layer.update(k * 1, v)[0], None, SCALE) + 0

    compiled = torch.compile(step, backend="eager")
    at = [slice(0, 9), slice(9, 10), slice(10, 11), slice(11, 16)]
    parts = [compiled(*(x[:, :, of] for x in (tokens.q, tokens.k, tokens.v))) for of in at]
    assert_equal_in_float64([torch.cat(parts, 2)], [dense(tokens, causal_mask(tokens))])


def test_a_models_own_window_stays_on_the_device() -> None:
    cache = HostCache(tiny("gemma3").config, 64)
    kinds = [[isinstance(s, HostStore) for s in layer.stores] for layer in cache.layers]
    assert kinds == [[False], [True]]


@pytest.mark.parametrize("heads", [0, -1, 1.5])
def test_a_number_of_heads_that_is_none_is_refused(heads: Any) -> None:
    with pytest.raises(ConfigError, match=f"heads={heads}"):
        HostCache(tiny().config, 64, heads)
