"""Spans by plan in models of transformers: training, padding, lengths, caches."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from transformers import DynamicCache, StaticCache

from bench.zoo import MODELS
from memopt.attention import SpanPlan
from tests.passes.span_calls import (
    HEADS,
    SINKS,
    remarks,
)
from tests.span_models import HALF, SHORT, compiled, masked, plan_for


def zoo_plan(model: Any, heads: int = 2) -> SpanPlan:
    config = model.config
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return plan_for(
        *(
            (
                f"model.layers.{i}.self_attn",
                config.num_attention_heads,
                heads,
                width,
                (SHORT, HALF),
            )
            for i in range(config.num_hidden_layers)
        ),
        lengths=(8, 128),
    )


class _Spans(torch.overrides.TorchFunctionMode):
    """Every causal call of a model, with the mask of a plan, or of that for another length."""

    def __init__(self, length: int | None = None) -> None:
        super().__init__()
        self.length = length

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not F.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        q, k, v = args
        step = k.shape[1] // HEADS
        spans = [rule.span(self.length or k.shape[2]) for rule in (SHORT, HALF)]
        return masked(q, k[:, ::step], v[:, ::step], spans, SINKS)


@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_models_of_transformers_train_with_spans(name: str) -> None:
    model, inputs = MODELS[name].make(dtype=torch.float64)
    with _Spans():
        expected = model(**inputs).loss
    wanted = torch.autograd.grad(expected, list(model.parameters()))
    actual = compiled(model, zoo_plan(model))(**inputs).loss
    assert not torch.allclose(expected, model(**inputs).loss)
    torch.testing.assert_close(actual, expected)
    mine = torch.autograd.grad(actual, list(model.parameters()))
    for one, other in zip(mine, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_model_trains_on_padded_batches(side: str) -> None:
    """As on each sequence by itself: none of its tokens sees padding."""
    model, inputs = MODELS["llama"].make(dtype=torch.float64)
    ids, n = inputs["input_ids"][:2, :48], 48
    real = torch.ones(2, n, dtype=torch.long)
    real[1, slice(11) if side == "left" else slice(n - 11, None)] = 0
    positions = (real.cumsum(1) - 1).clamp(min=0)
    given = {"input_ids": ids, "attention_mask": real, "position_ids": positions}
    step = compiled(model, zoo_plan(model))
    actual = step(**given).logits[real > 0]
    alone = [one[None, shown > 0] for one, shown in zip(ids, real, strict=True)]
    with _Spans(n):
        expected = torch.cat([model(input_ids=one).logits[0] for one in alone])
    torch.testing.assert_close(actual, expected)
    weights = torch.linspace(-1, 1, expected.numel(), dtype=torch.float64).view_as(expected)
    wanted, mine = (
        torch.autograd.grad((y * weights).sum(), list(model.parameters()))
        for y in (expected, actual)
    )
    for one, other in zip(mine, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-8)


def test_a_model_whose_lengths_change_is_compiled_once() -> None:
    model, inputs = MODELS["llama"].make(dtype=torch.float64)
    step = compiled(model, zoo_plan(model))
    for n in (48, 31, 20):
        given = {name: value[:, :n].clone() for name, value in inputs.items()}
        for value in given.values():
            torch._dynamo.mark_dynamic(value, 1)
        with _Spans():
            expected = model(**given).loss
        with torch._dynamo.config.patch(error_on_recompile=n != 48):
            torch.testing.assert_close(step(**given).loss, expected)


@torch.no_grad()
def test_a_model_decodes_with_a_cache_that_grows() -> None:
    model, inputs = MODELS["llama"].make(dtype=torch.float64)
    model.eval()
    ids = inputs["input_ids"]
    caches = [DynamicCache(config=model.config) for _ in range(2)]
    for cache in caches:
        model(input_ids=ids[:, :40], cache=cache, use_cache=True)
    step = compiled(model, zoo_plan(model))
    mine = step(input_ids=ids[:, 40:41], cache=caches[0], use_cache=True).logits
    with _Spans():
        wanted = model(input_ids=ids[:, 40:41], cache=caches[1], use_cache=True).logits
    torch.testing.assert_close(mine, wanted)


@torch.no_grad()
def test_a_static_cache_is_left_alone() -> None:
    made: tuple[Any, Any] = MODELS["llama"].make()
    model, inputs = made[0].eval(), made[1]
    ids = inputs["input_ids"]
    cache = StaticCache(config=model.config, max_cache_len=64)
    model(input_ids=ids[:, :40], cache=cache, use_cache=True)
    texts = remarks(model, zoo_plan(model), input_ids=ids[:, 40:41], cache=cache, use_cache=True)
    assert len(texts) == model.config.num_hidden_layers
    assert all("mask is not known to be causal" in text for text in texts)
