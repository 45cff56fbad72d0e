"""``generate()`` with caches that lose nothing gives what it gives with transformers' own."""

import copy
import subprocess
import sys
from importlib import metadata
from typing import Any

import pytest
import torch
import transformers as hf

from memopt import _versions
from memopt import cache as caches
from memopt.cache import HeadCache
from memopt.errors import ConfigError, UnsupportedVersionError
from tests.cache_models import (
    EXACT,
    FAMILIES,
    HEADS,
    LAYERS,
    WAYS,
    WIDTH,
    by_transformers,
    generated,
    prompts,
    tiny,
)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("family", FAMILIES)
def test_an_exact_cache_generates_the_same_tokens(family: str, way: str) -> None:
    model, inputs = tiny(family), prompts()
    expected = by_transformers(model, inputs, way)
    for make in EXACT.values():
        assert torch.equal(generated(model, inputs, way, cache=make(model.config)), expected)


@pytest.mark.parametrize("kind", EXACT)
@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3"])
def test_a_conversation_goes_on_where_it_ended(family: str, kind: str) -> None:
    model, first = tiny(family), prompts(padding=(0, 0))
    more = torch.randint(1, 96, (2, 9))

    def chat(cache: Any) -> torch.Tensor:
        said = generated(model, first, cache=cache)
        ids = torch.cat([said, more], 1)
        return generated(
            model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, cache=cache
        )

    model.set_attn_implementation("sdpa")
    expected = chat(hf.DynamicCache(config=model.config))
    caches.prepare(model)
    assert torch.equal(chat(EXACT[kind](model.config)), expected)


@pytest.mark.parametrize("kind", EXACT)
def test_a_prompt_may_come_in_pieces(kind: str) -> None:
    model, inputs = tiny("mistral"), prompts(30)
    expected = by_transformers(model, inputs, prefill_chunk_size=7)
    pieces = generated(model, inputs, cache=EXACT[kind](model.config), prefill_chunk_size=7)
    assert torch.equal(pieces, expected)


@pytest.mark.parametrize("kind", EXACT)
def test_a_cache_that_was_reset_is_as_good_as_new(kind: str) -> None:
    model = tiny()
    cache = EXACT[kind](model.config)
    for seed in (0, 1):
        torch.manual_seed(seed)
        inputs = prompts(15 + seed)
        expected = by_transformers(model, inputs)
        assert torch.equal(generated(model, inputs, cache=cache), expected)
        cache.reset()


@pytest.mark.parametrize("at", range(7))
def test_a_sequence_that_went_wrong_leaves_nothing_after_a_reset(at: int) -> None:
    """NaN in what is masked would be in every sum."""
    model, inputs = caches.prepare(tiny()), prompts(18)
    used, new = (everything(model.config)[at] for _ in range(2))
    weight = model.model.embed_tokens.weight.data
    good = weight.clone()
    with torch.no_grad():
        weight.fill_(float("nan"))
        model(**inputs, cache=used)
        for _ in range(2):
            mask = torch.ones(2, int(used.get_seq_length()) + 1, dtype=torch.int64)
            model(torch.tensor([[5], [7]]), attention_mask=mask, cache=used)
        weight.copy_(good)
        used.reset()
        short = prompts(5, (2, 0))
        assert torch.equal(generated(model, short, cache=used), generated(model, short, cache=new))


def test_a_backward_through_a_cache_is_refused() -> None:
    model = caches.prepare(tiny())
    logits = model(**prompts(), cache=EXACT["spans"](model.config)).logits
    with pytest.raises(ConfigError, match="train with use_cache=False"):
        logits.sum().backward()


def everything(config: Any) -> list[HeadCache]:
    """One cache of every kind, and two that hold some heads in one form and some in another."""
    spans = [[None, 6]] * LAYERS
    stage = caches.Stage()
    return [
        *(make(config) for make in EXACT.values()),
        caches.HeadSpanCache(config, spans, 64),
        caches.QuantizedCache(config, 64, group=4),
        caches.EvictingCache(config, 6, 64, ring=16, observed=4),
        caches.HeadSpanCache(config, spans, 64, full=stage.store),
        caches.HeadSpanCache(config, spans, 64, full=lambda n: caches.QuantizedStore(n, group=4)),
    ]


KINDS = ["full", "host", "spans", "quantized", "evicting", "spans and host", "spans and bits"]


@pytest.mark.parametrize("at", range(len(KINDS)), ids=KINDS)
def test_a_copy_of_a_cache_goes_on_by_itself(at: int) -> None:
    """As where one prefix serves many prompts."""
    model = caches.prepare(tiny())
    inputs = prompts()
    cache = everything(model.config)[at]
    with torch.no_grad():
        model(**inputs, cache=cache)
        twin = copy.deepcopy(cache)
        token = torch.tensor([[5], [7]])
        mask = torch.nn.functional.pad(inputs["attention_mask"], (0, 1), value=1)
        first = model(token, attention_mask=mask, cache=cache).logits
        model(token + 1, attention_mask=mask, cache=cache)
        assert torch.equal(model(token, attention_mask=mask, cache=twin).logits, first)


@pytest.mark.parametrize("at", range(len(KINDS)), ids=KINDS)
def test_rows_follow_their_beams(at: int) -> None:
    """Two sequences that change places go on as each other would have."""
    model = caches.prepare(tiny())
    inputs = prompts(padding=(0, 0))
    token = torch.tensor([[5], [7]])
    swap = torch.tensor([1, 0])
    plain, changed = (everything(model.config)[at] for _ in range(2))
    with torch.no_grad():
        for cache in (plain, changed):
            model(**inputs, cache=cache)
            model(token, cache=cache)
        changed.reorder_cache(swap)
        expected = model(token, cache=plain).logits
        torch.testing.assert_close(model(token[swap], cache=changed).logits, expected[swap])


@pytest.mark.parametrize("at", range(len(KINDS)), ids=KINDS)
def test_a_batch_may_be_repeated_and_picked_from(at: int) -> None:
    model = caches.prepare(tiny())
    inputs = prompts(padding=(0, 0))
    token = torch.tensor([[5], [7]])
    plain, changed = (everything(model.config)[at] for _ in range(2))
    with torch.no_grad():
        for cache in (plain, changed):
            model(**inputs, cache=cache)
        changed.batch_repeat_interleave(2)
        changed.batch_select_indices(torch.tensor([0, 3, 1]))
        expected = model(token, cache=plain).logits
        got = model(token[[0, 1, 0]], cache=changed).logits
    torch.testing.assert_close(got, expected[[0, 1, 0]])
    assert changed.batch_size == 3


@pytest.mark.parametrize("at", range(len(KINDS)), ids=KINDS)
def test_the_formula_counts_the_bytes_of_real_storages(at: int) -> None:
    model = caches.prepare(tiny())
    cache = everything(model.config)[at]
    assert cache.held_bytes() == 0
    generated(model, prompts(), "beams", cache=cache)
    assert cache.held_bytes() == cache.bytes_for(2 * 3, WIDTH, torch.float32)


@pytest.mark.parametrize("kind", ["full", "host", "spans", "spans and host"])
def test_how_a_prompt_is_cut_changes_nothing(kind: str) -> None:
    model = caches.prepare(tiny())
    ids = prompts(padding=(0, 0))["input_ids"]
    whole, pieces = (everything(model.config)[KINDS.index(kind)] for _ in range(2))
    with torch.no_grad():
        expected = model(ids, cache=whole).logits
        parts = [
            model(part, cache=pieces).logits for part in torch.split(ids, [1, 1, 6, 1, 7, 4], 1)
        ]
    torch.testing.assert_close(torch.cat(parts, 1), expected)


def test_layers_of_several_kinds_make_one_cache() -> None:
    model, inputs = tiny(), prompts()
    expected = by_transformers(model, inputs)
    kinds = [make(model.config).layers for make in EXACT.values()]
    mixed = HeadCache([kinds[0][0], kinds[1][1]])
    assert torch.equal(generated(model, inputs, cache=mixed), expected)
    assert mixed.held_bytes() == mixed.bytes_for(2, WIDTH, torch.float32)


def test_a_prepared_model_computes_the_same_without_a_cache() -> None:
    for family in ("llama", "mistral"):
        model, inputs = tiny(family), prompts()
        model.set_attn_implementation("sdpa")
        expected = model(**inputs, use_cache=False).logits
        got = caches.prepare(model)(**inputs, use_cache=False).logits
        real = inputs["attention_mask"].bool()
        torch.testing.assert_close(got[real], expected[real])


def test_a_model_that_was_not_prepared_is_told_so() -> None:
    model = tiny()
    with pytest.raises(ConfigError, match=r"call memopt\.cache\.prepare\(model\)"):
        generated(model, prompts(), cache=EXACT["spans"](model.config))


def test_another_cache_on_a_prepared_model_is_told_so() -> None:
    model = caches.prepare(tiny())
    with pytest.raises(ConfigError, match=r"set_attn_implementation\('sdpa'\)"):
        generated(model, prompts(), cache=hf.DynamicCache(config=model.config))


def test_more_tokens_than_there_is_room_for_are_an_error_with_the_number() -> None:
    model = caches.prepare(tiny())
    for padding in ((0, 0), (3, 0)):
        cache = caches.HeadSpanCache(model.config, [[None] * HEADS] * LAYERS, 25)
        with pytest.raises(ConfigError, match=r"26 tokens.*room for (max_length=)?25"):
            generated(model, prompts(padding=padding), cache=cache)


def test_another_batch_is_an_error_with_both_sizes() -> None:
    model = caches.prepare(tiny())
    cache = EXACT["spans"](model.config)
    generated(model, prompts(), cache=cache)
    cache.reset()
    with pytest.raises(ConfigError, match="6 sequences: the cache holds 2, beams included"):
        generated(model, prompts(), "beams", cache=cache)


def test_masks_that_are_more_than_causal_are_refused() -> None:
    model = caches.prepare(tiny())
    cache = EXACT["spans"](model.config)
    mask = torch.ones(2, 1, 20, 20).tril()
    with pytest.raises(ConfigError, match="give one of two dimensions"):
        model(prompts()["input_ids"], attention_mask=mask.bool(), cache=cache)


def test_dropout_in_attention_is_refused() -> None:
    model = tiny("llama")
    model.config.attention_dropout = 0.1
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.1
    caches.prepare(model).train()
    with pytest.raises(ConfigError, match=r"call model\.eval\(\) first"):
        model(**prompts(), cache=EXACT["spans"](model.config))


@pytest.mark.parametrize(
    ("config", "told"),
    [
        (hf.T5Config(), "decoders of text"),
        (hf.LlavaConfig(), "decoders of text"),
        (hf.Llama4TextConfig(num_hidden_layers=4), "chunked_attention"),
        (hf.Gemma3nTextConfig(num_hidden_layers=4, num_kv_shared_layers=2), "share keys"),
    ],
    ids=["encoder and decoder", "images", "chunks", "shared keys"],
)
def test_models_that_hold_something_else_are_refused(config: Any, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        caches.QuantizedCache(config, 64)


def test_a_softcap_is_refused() -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "head_dim": 8}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    config = hf.Gemma2Config(vocab_size=96, **sizes, **heads)
    model = caches.prepare(hf.Gemma2ForCausalLM(config).eval())
    with pytest.raises(ConfigError, match="'softcap'"):
        model(**prompts(), cache=EXACT["host"](config))


def test_assisted_generation_is_refused() -> None:
    cache = EXACT["spans"](tiny().config)
    with pytest.raises(ConfigError, match="without an assistant"):
        cache.crop(-1)


def test_a_cache_of_another_model_is_refused() -> None:
    model = caches.prepare(tiny())
    other = copy.deepcopy(model.config)
    other.num_key_value_heads = 4
    with pytest.raises(ConfigError, match="the cache was made for 4"):
        generated(model, prompts(), cache=caches.HostCache(other, 64))


@pytest.mark.parametrize("length", [0, -1, 2.5, None])
def test_a_length_that_is_none_is_refused(length: Any) -> None:
    with pytest.raises(ConfigError, match=f"max_length={length}"):
        caches.HostCache(tiny().config, length)


def python(code: str) -> str:
    command = [sys.executable, "-c", code]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def test_importing_memopt_does_not_import_transformers() -> None:
    assert python("import sys, memopt; print('transformers' in sys.modules)") == "False"


@pytest.mark.parametrize("version", ["4.57.1", "5.0.0", "6.0.0"])
def test_another_transformers_is_refused_with_the_command(
    monkeypatch: pytest.MonkeyPatch, version: str
) -> None:
    monkeypatch.setattr(metadata, "version", lambda _: version)
    told = f"transformers {version} is installed.*pip install 'transformers>=5.24"
    with pytest.raises(UnsupportedVersionError, match=told):
        _versions.TRANSFORMERS.check()


def test_a_missing_transformers_is_named_before_it_is_imported() -> None:
    code = """
import sys
from importlib import metadata
import memopt
def none(name): raise metadata.PackageNotFoundError(name)
metadata.version = none
try:
    import memopt.cache
except memopt.UnsupportedVersionError as error:
    print(error, 'transformers' in sys.modules)
"""
    told = python(code)
    assert told.startswith("transformers is not installed")
    assert told.endswith("False")
