"""Calls that spans must leave as they are, and plans and options that are refused."""

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import memopt
from memopt.attention import FULL, Elastic, SpanPlan
from memopt.errors import ConfigError, PlanError
from memopt.passes.sparse_attention import SparseAttention
from tests.passes.span_calls import (
    BATCH,
    HEADS,
    LENGTH,
    QUERIES,
    SINKS,
    WIDTH,
    Attend,
    Outer,
    Packed,
    apart,
    assert_same,
    changing,
    grows,
    plan,
    reference,
    remarks,
    tensors,
    told,
    whole,
)
from tests.span_models import HALF, SHORT, compiled, masked, plan_for


def in_steps(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention that ``fuse_attention`` makes a call of, and ``calibrate`` does not see."""
    k, v = (x.repeat_interleave(QUERIES // HEADS, 1) for x in (k, v))
    later = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool).triu(1)
    scores = (q @ k.mT * WIDTH**-0.5).masked_fill(later, -torch.inf)
    mixed: Tensor = scores.softmax(-1) @ v
    return mixed


def test_attention_that_is_written_out_is_no_call() -> None:
    def both(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return told(in_steps(q, k, v), k, v)

    given = tensors()
    q, k, v = given
    spans = [rule.span(LENGTH) for rule in (SHORT, HALF)]
    expected = q + masked(in_steps(q, k, v), k, v, spans, SINKS)
    assert_same(compiled(Outer(both), plan())(*given), expected, given)
    assert ["writes it out" in text for text in remarks(Outer(both), plan(), *given)] == [
        True, False,
    ]  # fmt: skip


def broken(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Two calls, each in a graph of its own."""
    q = told(q, k, v)
    torch._dynamo.graph_break()
    return told(q, k, v)


def test_calls_that_a_graph_break_parts_are_computed_in_full() -> None:
    own: tuple[Any, ...] = (QUERIES, HEADS, WIDTH)
    both = plan_for(("", *own, (SHORT, HALF)), ("#1", *own, (HALF, SHORT)))
    given = tensors()
    with pytest.warns(UserWarning, match="1 of the 2 calls of attention in module ''"):
        actual = compiled(Attend(broken), both)(*given)
    assert_same(actual, broken(*given), given)


def test_a_graph_that_begins_within_a_module_may_be_behind_a_break() -> None:
    with pytest.raises(Exception, match="TORCH_LOGS=graph_breaks names it"):
        compiled(Outer(broken), plan())(*tensors())


def test_changing_lengths_out_of_range_are_computed_in_full() -> None:
    model = compiled(Packed(told), plan(HALF, SHORT))
    x = changing(tensors(40))
    parts = apart(x)
    assert_same(model(x), reference((HALF, SHORT), *parts), [x])
    for n in (80, 12):
        x = changing(tensors(n))
        with pytest.warns(UserWarning, match="tokens are not 16 to 64"):
            actual = model(x)
        assert_same(actual, Packed(told)(x), [x])


def test_a_length_out_of_range_is_said_once() -> None:
    given = tensors(80)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        actual = compiled(Outer(told, layers=2), plan(layers=2))(*given)
    assert len([w for w in caught if "sparse_attention" in str(w.message)]) == 1
    assert_same(actual, Outer(told, layers=2)(*given), given)


def dropped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, dropout_p=0.5, is_causal=True, enable_gqa=True)


def windowed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    at = torch.arange(q.shape[2])
    apart = at[:, None] - at
    mask = (apart >= 0) & (apart < 30)
    k, v = (x.repeat_interleave(QUERIES // HEADS, 1) for x in (k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def softened(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    bias = torch.full((q.shape[2], q.shape[2]), -1e4, dtype=q.dtype).triu(1)
    k, v = (x.repeat_interleave(QUERIES // HEADS, 1) for x in (k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias)


@pytest.mark.parametrize(
    ("how", "why"),
    [
        (whole, "not causal"),
        (windowed, "mask is not known to be causal"),
        (softened, "mask is not known to be causal"),
        (dropped, "dropped at random"),
    ],
)
def test_what_is_not_causal_is_left_alone(how: Any, why: str) -> None:
    given = tensors()
    (text,) = remarks(Outer(how), plan(), *given)
    assert why in text
    if how is not dropped:
        assert_same(compiled(Outer(how), plan())(*given), Outer(how)(*given), given)


@pytest.mark.parametrize("at", [0, 1, 2])
def test_heads_that_are_broadcast_are_left_alone(at: int) -> None:
    """Of which the operator knows nothing, and eager attention does."""
    torch.manual_seed(0)
    given = [torch.randn(BATCH, HEADS, LENGTH, WIDTH, requires_grad=True) for _ in range(3)]
    given[at] = torch.randn(BATCH, 1, LENGTH, WIDTH, requires_grad=True)
    model = Outer(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True))
    own = plan_for(("layers.0", HEADS, HEADS, WIDTH, (SHORT, HALF)))
    (text,) = remarks(model, own, *given)
    assert "heads of queries read" in text
    assert_same(compiled(model, own)(*given), model(*given), given)


@pytest.mark.parametrize("keys", [40, 60])
def test_attention_to_another_sequence_is_left_alone(keys: int) -> None:
    given = tensors(48, keys)
    for how in (whole, told):
        (text,) = remarks(Outer(how), plan(), *given)
        assert "not causal" in text or "fewer queries than keys" in text


def test_one_query_of_another_sequence_is_left_alone() -> None:
    (text,) = remarks(Outer(whole), plan(), *tensors(1, LENGTH))
    assert "not causal" in text


def test_two_tokens_behind_a_cache_are_left_alone() -> None:
    q, k, v = tensors(2, LENGTH)
    new = torch.randn(BATCH, HEADS, 2, WIDTH, dtype=q.dtype)
    (text,) = remarks(Outer(grows), plan(), q, k, v, new)
    assert "not causal" in text


def said(given: SpanPlan, model: nn.Module, *inputs: Tensor) -> str:
    """The one remark, where no one asks for spans that save nothing."""
    torch._dynamo.reset()
    options: Any = {"passes": {"sparse_attention": {"plan": given}}, "lowering": "eager"}
    report = memopt.explain(model, *inputs, options=options)
    (text,) = (r.text for r in report.graphs[0].remarks if r.pass_name == SparseAttention.name)
    return text


def test_what_saves_nothing_is_computed_in_full() -> None:
    long: Any = {"lengths": (16, 8192)}
    prefill = tensors(1024, dtype=torch.float32)
    assert "as fast" in said(plan(**long), Outer(told), *tensors())
    assert "off by" in said(plan(**long), Outer(told), *prefill)
    wide = plan(Elastic(0, 7), Elastic(0, 6), **long)
    assert "saves nothing" in said(wide, Outer(told), *prefill)
    q, k, v = tensors(1, 4095, dtype=torch.float32)
    new = torch.zeros(BATCH, HEADS, 1, WIDTH)
    assert "off by" in said(plan(**long), Outer(grows), q, k, v, new)
    assert "as fast" in said(plan(**long), Outer(grows), q, k[:, :, :-1], v[:, :, :-1], new)
    wide = plan(SHORT, FULL, **long)
    assert "saves nothing" in said(wide, Outer(grows), q, k, v, new)


@pytest.mark.parametrize(
    "other",
    [
        ("layers.1", QUERIES, HEADS, WIDTH),
        ("blocks.0", QUERIES, HEADS, WIDTH),
        ("layers.0", 2 * QUERIES, HEADS, WIDTH),
        ("layers.0", QUERIES, QUERIES, WIDTH),
        ("layers.0", QUERIES, HEADS, 2 * WIDTH),
        ("", QUERIES, HEADS, WIDTH),
    ],
)
@pytest.mark.parametrize("strict", [True, False])
def test_a_plan_for_another_model_is_an_error(other: Any, strict: bool) -> None:
    wrong = plan_for((*other, (SHORT,) * other[2]))
    with pytest.raises(Exception, match="calibrate this one") as caught:
        compiled(Outer(told), wrong, strict=strict)(*tensors())
    assert isinstance(caught.value.inner_exception, PlanError)  # type: ignore[attr-defined]


def test_another_scale_is_another_model() -> None:
    def scaled(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=1.0, enable_gqa=True)

    with pytest.raises(Exception, match="scale 1"):
        compiled(Outer(scaled), plan())(*tensors())


def test_the_pass_without_a_plan_is_an_error() -> None:
    options: Any = {"passes": {"sparse_attention": True}}
    torch._dynamo.reset()
    with pytest.raises(Exception, match="needs a plan"):
        torch.compile(Outer(told), backend="memopt", options=options)(*tensors())


def test_it_is_off_until_a_plan_is_named() -> None:
    report = memopt.explain(Outer(told), *tensors(), options={"lowering": "eager"})
    assert not [r for r in report.graphs[0].remarks if r.pass_name == SparseAttention.name]


@pytest.mark.parametrize("value", [3, True, [1], 0.5])
def test_a_plan_of_another_type_is_refused(value: Any) -> None:
    with pytest.raises(ConfigError, match="allowed is a SpanPlan"):
        memopt.optimize(Outer(told), passes={"sparse_attention": {"plan": value}})


def test_a_file_that_is_no_plan_is_refused_before_anything_is_compiled(tmp_path: Path) -> None:
    for path in (tmp_path / "none.json", tmp_path):
        with pytest.raises(PlanError, match="cannot read"):
            memopt.optimize(Outer(told), passes={"sparse_attention": {"plan": path}})


def test_always_is_yes_or_no() -> None:
    with pytest.raises(ConfigError, match="'always'"):
        memopt.optimize(Outer(told), passes={"sparse_attention": {"always": 1}})
