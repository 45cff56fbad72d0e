"""Spans by plan in graphs: the numbers of a mask, forward and backward."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from memopt.attention import FULL, Elastic
from memopt.attention.rules import Rule
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
    by_mask,
    changing,
    expanded,
    grows,
    plan,
    reference,
    remarks,
    tensors,
    told,
    unlinked,
)
from tests.span_models import HALF, SHORT, compiled, masked, plan_for


@pytest.mark.parametrize("how", [told, expanded, by_mask, unlinked])
def test_numbers_and_gradients_are_those_of_a_mask(how: Any) -> None:
    given = tensors()
    assert_same(compiled(Outer(how), plan())(*given), reference((SHORT, HALF), *given), given)


@pytest.mark.parametrize(
    "rules", [(SHORT, FULL), (FULL, SHORT), (HALF, HALF), (Elastic(1, 0), Elastic(3, 7))]
)
def test_every_head_has_its_own_span(rules: tuple[Rule, ...]) -> None:
    given = tensors()
    assert_same(compiled(Outer(told), plan(*rules))(*given), reference(rules, *given), given)


def test_every_layer_has_its_own_rules() -> None:
    given = tensors()
    first, second = (SHORT, HALF), (HALF, Elastic(12, 0))
    both = plan_for(
        ("layers.0", QUERIES, HEADS, WIDTH, first), ("layers.1", QUERIES, HEADS, WIDTH, second)
    )
    expected = reference(second, reference(first, *given), *given[1:])
    assert_same(compiled(Outer(told, layers=2), both)(*given), expected, given)


def test_a_module_that_attends_twice_has_rules_for_each_call() -> None:
    def twice(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return told(q + told(q, k, v), k, v)

    given = tensors()
    q, k, v = given
    first, second = (SHORT, HALF), (HALF, SHORT)
    both = plan_for(
        ("layers.0", QUERIES, HEADS, WIDTH, first), ("layers.0#1", QUERIES, HEADS, WIDTH, second)
    )
    spans = [rule.span(LENGTH) for rule in second]
    expected = q + masked(reference(first, q, k, v), k, v, spans, SINKS)
    assert_same(compiled(Outer(twice), both)(*given), expected, given)


def test_a_call_with_a_window_of_its_own_counts_as_a_call() -> None:
    """Which ``prove_causal`` has rewritten by then."""
    n = 1024
    window = torch.ones(n, n, dtype=torch.bool).tril().triu(-29)

    def twice(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        at = torch.arange(n)
        near = (at[:, None] >= at) & (at[:, None] - at < 30)
        first = F.scaled_dot_product_attention(q, k, v, attn_mask=near, enable_gqa=True)
        return told(first, k, v)

    shapes = [(1, h, n, WIDTH) for h in (QUERIES, HEADS, HEADS)]
    given = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    q, k, v = given
    own: tuple[Any, ...] = (QUERIES, HEADS, WIDTH)
    of_both = plan_for(
        ("layers.0", *own, ()), ("layers.0#1", *own, (SHORT, HALF)), lengths=(16, 2048)
    )
    first = F.scaled_dot_product_attention(q, k, v, attn_mask=window, enable_gqa=True)
    expected = q + masked(first, k, v, [rule.span(n) for rule in (SHORT, HALF)], SINKS)
    assert_same(compiled(Outer(twice), of_both)(*given), expected, given)


def test_inductor_computes_the_same() -> None:
    given = tensors(dtype=torch.float32)
    actual = compiled(Outer(told), plan(), lowering="inductor")(*given)
    assert_same(actual, reference((SHORT, HALF), *given), given)


def test_lengths_that_change_are_compiled_once() -> None:
    model = compiled(Packed(told), plan(HALF, SHORT))
    for n in (48, 33, 64, 17):
        x = changing(tensors(n))
        parts = apart(x)
        with torch._dynamo.config.patch(error_on_recompile=n != 48):
            assert_same(model(x), reference((HALF, SHORT), *parts), [x])


def padded(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    at = torch.arange(q.shape[2])
    k, v = (x.repeat_interleave(QUERIES // HEADS, 1) for x in (k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=(at[:, None] >= at) & mask)


PADDING = {
    "left": lambda at: at >= 9,
    "right": lambda at: at < 31,
    "both sides": lambda at: (at >= 5) & (at < 40),
    "in between": lambda at: at % 5 != 2,
    "none": lambda at: at >= 0,
    "all": lambda at: at < 0,
}


def of_real_tokens(rules: tuple[Rule, ...], real: Tensor, *given: Tensor) -> Tensor:
    """What a sequence's own tokens see of each other, and nothing elsewhere."""
    spans = [rule.span(real.shape[1]) for rule in rules]
    rows = []
    for one, *of_one in zip(real, *given, strict=True):
        shown = one.nonzero()[:, 0]
        q, k, v = (x[None, :, shown] for x in of_one)
        mixed = masked(q, k, v, spans, SINKS)
        rows.append(torch.zeros_like(of_one[0]).index_copy(1, shown, mixed[0]))
    return torch.stack(rows)


@pytest.mark.parametrize("kind", PADDING)
def test_tokens_see_their_span_of_what_is_no_padding(kind: str) -> None:
    given = tensors()
    real = torch.stack([PADDING[kind](torch.arange(LENGTH)), torch.arange(LENGTH) >= 2])
    model = compiled(Attend(padded), plan_for(("", QUERIES, HEADS, WIDTH, (SHORT, HALF))))
    actual = model(*given, real[:, None, None]).where(real[:, None, :, None], 0.0)
    assert_same(actual, of_real_tokens((SHORT, HALF), real, *given), given)


def padded_from(q: Tensor, k: Tensor, v: Tensor, first: Tensor) -> Tensor:
    """Of sequences that begin at these tokens."""
    return padded(q, k, v, (torch.arange(q.shape[2]) >= first)[:, None, None])


def test_padded_lengths_may_change() -> None:
    model = compiled(Packed(padded_from), plan(HALF, SHORT))
    first = torch.tensor([[0], [7]])
    for n in (48, 33, 64):
        x = changing(tensors(n))
        real = torch.arange(n) >= first
        with torch._dynamo.config.patch(error_on_recompile=n != 48):
            mixed = model(x, first)
        q, k, v = apart(x)
        expected = q + of_real_tokens((HALF, SHORT), real, q, k, v)
        hidden = ~real[:, None, :, None]
        assert_same(mixed.masked_fill(hidden, 0), expected.masked_fill(hidden, 0), [x])


def test_a_remark_names_padding() -> None:
    given = tensors()
    (text,) = remarks(Outer(padded), plan(), *given, torch.ones(BATCH, 1, 1, LENGTH) > 0)
    assert "tokens that the mask hides mean nothing" in text


@pytest.mark.parametrize("dynamic", [False, True])
def test_a_token_behind_a_growing_cache_reads_its_spans(dynamic: bool) -> None:
    model = compiled(Outer(grows), plan())
    for n in (47, 30) if dynamic else (47,):
        q, k, v = tensors(1, n)
        new = torch.randn(BATCH, HEADS, 1, WIDTH, dtype=q.dtype, requires_grad=True)
        keys, values = torch.cat([k, new], 2), torch.cat([v, new + 1], 2)
        expected = reference((SHORT, HALF), q, keys, values)
        assert_same(model(q, k, v, new), expected, [q, k, v, new])


def test_every_call_is_listed_with_the_error_of_its_heads() -> None:
    texts = remarks(Outer(told, layers=2), plan(layers=2), *tensors())
    assert len(texts) == 2
    for text in texts:
        assert "off by 2.5e-01, 2.5e-01" in text
        assert "held-out loss by 1.00%" in text


def test_what_saves_is_rewritten_without_being_told_so() -> None:
    n = 1024
    long = plan(lengths=(64, n))
    given = tensors(n, dtype=torch.float32)
    options: Any = {"passes": {"sparse_attention": {"plan": long}}, "lowering": "eager"}
    torch._dynamo.reset()
    model = torch.compile(Outer(told), backend="memopt", options=options)
    torch.testing.assert_close(model(*given), reference((SHORT, HALF), *given))


def test_spans_begin_where_a_changing_length_is_worth_it() -> None:
    long = plan(SHORT, SHORT, lengths=(16, 2048))
    options: Any = {"passes": {"sparse_attention": {"plan": long}}, "lowering": "eager"}
    torch._dynamo.reset()
    model = torch.compile(Packed(told), backend="memopt", options=options)
    for n, rules in ((40, (FULL, FULL)), (1030, (SHORT, SHORT)), (1040, (SHORT, SHORT))):
        x = changing(tensors(n, dtype=torch.float32))
        torch.testing.assert_close(model(x), reference(rules, *apart(x)))


def test_plans_are_given_as_objects_and_as_files(tmp_path: Path) -> None:
    path = plan().save(tmp_path / "plan.json")
    given = tensors()
    for one in (plan(), path, str(path), plan().to_json()):
        assert_same(compiled(Outer(told), one)(*given), reference((SHORT, HALF), *given), given)
