"""Spans by plan in graphs: the numbers of a mask, and calls that must stay as they are."""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import DynamicCache, StaticCache

import memopt
from bench.zoo import MODELS
from memopt.attention import FULL, Elastic, SpanPlan
from memopt.attention.rules import Rule
from memopt.errors import ConfigError, PlanError
from memopt.passes.sparse_attention import SparseAttention
from tests.span_models import HALF, SHORT, compiled, masked, plan_for

BATCH, QUERIES, HEADS, LENGTH, WIDTH = 2, 4, 2, 48, 16
SINKS = 4


class Attend(nn.Module):
    """Attention of what it is given, written in one of several ways."""

    def __init__(self, how: Callable[..., Tensor]) -> None:
        super().__init__()
        self.how = how

    def forward(self, q: Tensor, k: Tensor, v: Tensor, *more: Tensor) -> Tensor:
        return self.how(q, k, v, *more)


class Outer(nn.Module):
    """A model around it, which gives the call a name."""

    def __init__(self, how: Callable[..., Tensor], layers: int = 1) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Attend(how) for _ in range(layers))

    def forward(self, q: Tensor, k: Tensor, v: Tensor, *more: Tensor) -> Tensor:
        for layer in self.layers:
            q = q + layer(q, k, v, *more)
        return q


def told(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


def expanded(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    k, v = (x.repeat_interleave(QUERIES // HEADS, 1) for x in (k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def by_mask(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    at = torch.arange(q.shape[2], device=q.device)
    k, v = (x.repeat_interleave(QUERIES // HEADS, 1) for x in (k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=at[:, None] >= at)


def unlinked(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Heads that are repeated in a way that no one knows."""
    k, v = (x[:, [0, 0, 1, 1]] for x in (k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def tensors(n: int = LENGTH, m: int | None = None, dtype: Any = torch.float64) -> list[Tensor]:
    torch.manual_seed(0)
    shapes = [
        (BATCH, h, rows, WIDTH)
        for h, rows in zip((QUERIES, HEADS, HEADS), (n, m or n, m or n), strict=True)
    ]
    return [torch.randn(shape, dtype=dtype, requires_grad=True) for shape in shapes]


def apart(x: Tensor) -> list[Tensor]:
    return list(torch.split(x, [QUERIES, HEADS, HEADS], dim=1))


class Packed(Outer):
    """Queries, keys and values of one length, which may change."""

    def forward(self, x: Tensor, *more: Tensor) -> Tensor:
        return super().forward(*apart(x), *more)


def changing(given: list[Tensor]) -> Tensor:
    packed = torch.cat([t.detach() for t in given], 1).requires_grad_()
    torch._dynamo.mark_dynamic(packed, 2)
    return packed


def plan(*rules: Rule, layers: int = 1, **given: Any) -> SpanPlan:
    each = rules or (SHORT, HALF)
    return plan_for(
        *((f"layers.{i}", QUERIES, HEADS, WIDTH, each) for i in range(layers)), **given
    )


def reference(rules: tuple[Rule, ...], q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    n = k.shape[2]
    return q + masked(q, k, v, [rule.span(n) for rule in rules], SINKS)


def remarks(model: nn.Module, given: Any, *inputs: Any, **named: Any) -> list[str]:
    torch._dynamo.reset()
    options: Any = {"passes": {"sparse_attention": {"plan": given, "always": True}}}
    report = memopt.explain(
        model, *inputs, options=options | {"lowering": "eager", "strict": True}, **named
    )
    found = [r for graph in report.graphs for r in graph.remarks]
    return [r.text for r in found if r.pass_name == SparseAttention.name]


def assert_same(actual: Tensor, expected: Tensor, given: list[Tensor]) -> None:
    torch.testing.assert_close(actual, expected)
    weights = torch.linspace(-1, 1, expected.numel(), dtype=expected.dtype).view_as(expected)
    wanted, mine = (torch.autograd.grad((y * weights).sum(), given) for y in (expected, actual))
    for one, other in zip(mine, wanted, strict=True):
        torch.testing.assert_close(one, other)


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


def padded(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    at = torch.arange(q.shape[2])
    k, v = (x.repeat_interleave(QUERIES // HEADS, 1) for x in (k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=(at[:, None] >= at) & mask)


def whole(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, enable_gqa=True)


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


def grows(q: Tensor, k: Tensor, v: Tensor, new: Tensor) -> Tensor:
    """One token behind those of a cache."""
    k, v = torch.cat([k, new], dim=2), torch.cat([v, new + 1], dim=-2)
    return F.scaled_dot_product_attention(q, k, v, enable_gqa=True)


@pytest.mark.parametrize("dynamic", [False, True])
def test_a_token_behind_a_growing_cache_reads_its_spans(dynamic: bool) -> None:
    model = compiled(Outer(grows), plan())
    for n in (47, 30) if dynamic else (47,):
        q, k, v = tensors(1, n)
        new = torch.randn(BATCH, HEADS, 1, WIDTH, dtype=q.dtype, requires_grad=True)
        keys, values = torch.cat([k, new], 2), torch.cat([v, new + 1], 2)
        expected = reference((SHORT, HALF), q, keys, values)
        assert_same(model(q, k, v, new), expected, [q, k, v, new])


def test_two_tokens_behind_a_cache_are_left_alone() -> None:
    q, k, v = tensors(2, LENGTH)
    new = torch.randn(BATCH, HEADS, 2, WIDTH, dtype=q.dtype)
    (text,) = remarks(Outer(grows), plan(), q, k, v, new)
    assert "not causal" in text


def test_every_call_is_listed_with_the_error_of_its_heads() -> None:
    texts = remarks(Outer(told, layers=2), plan(layers=2), *tensors())
    assert len(texts) == 2
    for text in texts:
        assert "off by 2.5e-01, 2.5e-01" in text
        assert "held-out loss by 1.00%" in text


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


def test_plans_are_given_as_objects_and_as_files(tmp_path: Path) -> None:
    path = plan().save(tmp_path / "plan.json")
    given = tensors()
    for one in (plan(), path, str(path), plan().to_json()):
        assert_same(compiled(Outer(told), one)(*given), reference((SHORT, HALF), *given), given)


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
