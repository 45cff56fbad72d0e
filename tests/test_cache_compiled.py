"""Steps of one token compile whole, once, and give what they give uncompiled."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from transformers import CompileConfig

from memopt import cache as caches
from memopt._torch import dynamo_counters
from memopt.cache import HeadCache
from tests.cache_models import generated, prompts, tiny

KINDS: dict[str, Callable[[Any], HeadCache]] = {
    "spans": lambda config: caches.HeadSpanCache(config, spans(config), 64),
    "quantized": lambda config: caches.QuantizedCache(config, 64, group=4),
    "evicting": lambda config: caches.EvictingCache(config, 6, 64, ring=8, observed=4),
    "spans and bits": lambda config: caches.HeadSpanCache(
        config, spans(config), 64, full=partial(caches.QuantizedStore, group=4)
    ),
}


def spans(config: Any) -> list[list[int | None]]:
    both: list[list[int | None]] = [[None, 4], [3, 6]]
    return both[: config.num_hidden_layers]


def compiled(backend: str) -> CompileConfig:
    config = CompileConfig(backend=backend, fullgraph=True, mode=None)
    config._compile_all_devices = True  # transformers compiles on a GPU alone, unless told to
    return config


@pytest.mark.parametrize("kind", KINDS)
def test_one_graph_serves_all_tokens_of_prompts_of_all_lengths(kind: str) -> None:
    model, make = caches.prepare(tiny(layers=1)), KINDS[kind]
    dynamo_counters.clear()
    for n in (20, 23):
        inputs = prompts(n, (0, 0))
        plain = generated(model, inputs, cache=make(model.config), disable_compile=True)
        cache, how = make(model.config), compiled("aot_eager")
        assert torch.equal(generated(model, inputs, cache=cache, compile_config=how), plain)
    assert dynamo_counters["stats"]["unique_graphs"] == 1
    assert not dynamo_counters["graph_break"]


FAMILIES = [
    pytest.param(name, marks=pytest.mark.slow) for name in ("qwen2", "mistral", "phi3", "olmo2")
]


@pytest.mark.parametrize("family", ["qwen3", "gemma3", *FAMILIES])
def test_every_family_compiles(family: str) -> None:
    """With padding, which takes the other path through a store."""
    model, make = caches.prepare(tiny(family)), KINDS["spans"]
    inputs, how = prompts(padding=(7, 0)), compiled("eager")
    plain = generated(model, inputs, cache=make(model.config), disable_compile=True)
    got = generated(model, inputs, cache=make(model.config), compile_config=how)
    assert torch.equal(got, plain)


def test_compiled_and_uncompiled_steps_may_follow_each_other() -> None:
    model = caches.prepare(tiny(layers=1))
    ids = prompts(30, (0, 0))["input_ids"]
    plain, mixed = (KINDS["spans and bits"](model.config) for _ in range(2))
    step = torch.compile(model, backend="eager", fullgraph=True)
    with torch.no_grad():
        for at, part in enumerate(torch.split(ids, [12, 1, 1, 1, 3, 1, 1, 5, 1, 4], 1)):
            run = step if part.shape[1] == 1 and at % 3 else model
            expected = model(part, cache=plain).logits
            torch.testing.assert_close(run(part, cache=mixed).logits, expected)


def test_memopt_compiles_the_steps() -> None:
    model = caches.prepare(tiny(layers=1))
    plain, other = (KINDS["spans"](model.config) for _ in range(2))
    ids = prompts(14, padding=(0, 0))["input_ids"]
    step = torch.compile(model, backend="memopt", fullgraph=True, options={"lowering": "eager"})
    with torch.no_grad():
        for part in torch.split(ids, [12, 1, 1], 1):
            run = step if part.shape[1] == 1 else model
            expected = model(part, cache=plain).logits
            torch.testing.assert_close(run(part, cache=other).logits, expected)


@pytest.mark.slow
@pytest.mark.parametrize("padding", [(0, 0), (3, 0)])
@pytest.mark.parametrize("kind", KINDS)
def test_inductor_compiles_the_steps(kind: str, padding: tuple[int, int]) -> None:
    """Past the spans, the rings and the blocks, so that all that is held has been replaced."""
    torch._dynamo.reset()
    model = caches.prepare(tiny(layers=1))
    plain, other = (KINDS[kind](model.config) for _ in range(2))
    inputs = prompts(14, padding)
    step: Any = torch.compile(model.forward, backend="memopt", fullgraph=True)
    with torch.no_grad():
        for cache in (plain, other):
            model(**inputs, cache=cache)
        for _ in range(10):
            mask = torch.nn.functional.pad(inputs["attention_mask"], (0, 1), value=1)
            inputs = {"input_ids": torch.randint(1, 96, (2, 1)), "attention_mask": mask}
            expected = model(**inputs, cache=plain).logits
            torch.testing.assert_close(step(**inputs, cache=other).logits, expected)


def test_a_compiled_step_with_gradients_is_refused() -> None:
    model = caches.prepare(tiny(layers=1))
    cache = KINDS["spans"](model.config)
    ids = prompts(14, padding=(0, 0))["input_ids"]
    step: Any = torch.compile(model, backend="eager", fullgraph=True)
    with pytest.raises(Exception, match="call it under torch"):
        step(ids, cache=cache)


def test_a_compiled_prompt_is_refused_where_its_codes_cannot_be_made() -> None:
    model = caches.prepare(tiny(layers=1))
    cache = KINDS["quantized"](model.config)
    ids = prompts(14, padding=(0, 0))["input_ids"]
    step: Any = torch.compile(model, backend="eager", fullgraph=True)
    with torch.no_grad(), pytest.raises(Exception, match="compile the steps of one token"):
        step(ids, cache=cache)
