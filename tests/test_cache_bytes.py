"""What caches of Llama-3-8B hold at 128k tokens, by their storages, and what a step adds."""

from typing import Any

import pytest
import torch
import transformers as hf

from memopt import cache as caches
from memopt._torch import TorchDispatchMode, pytree
from memopt.cache import FullStore, HeadCache, HeadLayer, QuantizedStore, Stage
from memopt.memory.meter import StorageMeter, storage_key
from tests.cache_steps import SCALE, Tokens, fed

TOKENS, HEADS, WIDTH, LAYERS = 131072, 8, 128, 32
FULL_BYTES = 2 * LAYERS * HEADS * TOKENS * WIDTH * 2


def llama(layers: int = LAYERS) -> hf.LlamaConfig:
    return hf.LlamaConfig(
        hidden_size=4096,
        num_hidden_layers=layers,
        num_attention_heads=32,
        num_key_value_heads=HEADS,
        max_position_embeddings=TOKENS,
    )


def share(cache: HeadCache) -> float:
    """Of a full cache's bytes; storages of the meta device have a size and no memory."""
    cache.early_initialization(1, HEADS, WIDTH, torch.bfloat16, torch.device("meta"))
    assert cache.held_bytes() == cache.bytes_for(1, WIDTH)
    return cache.held_bytes() / FULL_BYTES


def test_a_full_cache_is_sixteen_gib() -> None:
    cache = caches.HeadSpanCache(llama(), [[None] * HEADS] * LAYERS, TOKENS)
    assert FULL_BYTES == 16 * 2**30
    assert share(cache) == pytest.approx(1, abs=1e-6)


def test_spans_of_four_sizes_hold_a_third() -> None:
    """Half of the heads look 1k back, a quarter 32k, and a quarter at everything."""
    spans = [[1024] * 4 + [32768] * 2 + [None] * 2] * LAYERS
    assert share(caches.HeadSpanCache(llama(), spans, TOKENS)) == pytest.approx(0.3164, abs=1e-3)


def test_half_of_the_heads_at_a_small_span_hold_half() -> None:
    spans = [[256] * 4 + [None] * 4] * LAYERS
    assert share(caches.HeadSpanCache(llama(), spans, TOKENS)) == pytest.approx(0.501, abs=1e-3)


@pytest.mark.parametrize(("bits", "most"), [(4, 0.27), (8, 0.52)])
def test_four_bits_hold_less_than_27_percent(bits: int, most: float) -> None:
    assert share(caches.QuantizedCache(llama(), TOKENS, bits=bits)) <= most


def test_spans_and_four_bits_multiply() -> None:
    spans = [[1024] * 4 + [None] * 4] * LAYERS
    cache = caches.HeadSpanCache(llama(), spans, TOKENS, full=QuantizedStore)
    assert share(cache) <= 0.5 * 0.27 + 0.005


def test_a_pyramid_of_2048_tokens_holds_two_percent() -> None:
    assert share(caches.EvictingCache(llama(), 2048, TOKENS)) == pytest.approx(0.0195, abs=1e-3)


def test_the_host_leaves_a_128th_on_the_device() -> None:
    """Two heads' places serve any number of layers; so two layers' host memory is enough here."""
    layers = 2
    assert share(caches.HostCache(llama(layers), TOKENS)) <= 1 / 128 + 1e-6
    two = caches.HostCache(llama(layers), TOKENS, heads=2)
    assert share(two) <= 1 / 64 + 1e-6
    assert two.host_bytes() == FULL_BYTES * layers // LAYERS


class Peak(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """The most bytes at once that are allocated meanwhile."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.meter = StorageMeter(granularity=1)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for given in pytree.tree_leaves((args, kwargs or {})):
            if isinstance(given, torch.Tensor) and storage_key(given) not in self.meter.live:
                self.meter.ignore([given])
        result = func(*args, **(kwargs or {}))
        for made in pytree.tree_leaves(result):
            if isinstance(made, torch.Tensor):
                self.meter.allocate(made, str(func))
        return result


def same_widths(tokens: Tokens) -> Tokens:
    """Where values are wider than keys, SDPA makes a copy of the keys to scale."""
    return Tokens(tokens.q, tokens.k, tokens.v[..., : tokens.k.shape[3]], tokens.real)


@pytest.mark.parametrize(("kind", "most"), [("full", 0.1), ("bits", 3), ("host", 0.1)])
def test_a_step_adds_no_more_than_some_heads(kind: str, most: float) -> None:
    """Of eight: a layer is never made whole, nor are keys there for each query of a group."""
    n, heads, width = 2048, 8, 32
    stores = {
        "full": FullStore(n),
        "bits": QuantizedStore(n, 4, 64),
        "host": Stage(1).store(n),
    }
    tokens = same_widths(Tokens.drawn(n - 3, heads, 4, width, (0,), torch.float32))
    layer = HeadLayer([(range(heads), stores[kind])], n)
    fed(layer, tokens, [n - 3])
    more = same_widths(Tokens.drawn(1, heads, 4, width, (0,), torch.float32))
    with Peak() as peak:
        layer.attend(more.q, layer.update(more.k, more.v)[0], None, SCALE)
    one_head = n * 2 * width * 4
    assert peak.meter.peak_bytes <= most * one_head
