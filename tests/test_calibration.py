"""Spans that are found on data: what they keep, what is refused, and what a model is left as."""

import dataclasses
import io
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor, nn

from bench import retrieval
from bench.zoo import MODELS
from memopt import progress
from memopt.attention import SpanPlan, calibrate
from memopt.attention.profile import profiled
from memopt.attention.runs import loss_of
from memopt.errors import ConfigError, LossGuardError, PlanError
from tests.span_models import compiled, masked

WIDTH, WORDS = 32, 16


@pytest.fixture(scope="module")
def retriever() -> retrieval.Retriever:
    return retrieval.trained(enough=0.05)


@pytest.fixture(scope="module")
def found(retriever: retrieval.Retriever) -> SpanPlan:
    return retrieval.planned(retriever)


def test_spans_keep_what_windows_of_the_same_budget_lose(
    retriever: retrieval.Retriever, found: SpanPlan
) -> None:
    full = retrieval.accuracy(retriever)
    assert full > 0.95
    assert found.density(retrieval.LENGTH) <= retrieval.BUDGET
    own, even = found, retrieval.uniform(found)
    assert even.density(retrieval.LENGTH) == pytest.approx(own.density(retrieval.LENGTH), abs=0.02)
    kept, lost = (retrieval.accuracy(compiled(retriever, plan)) / full for plan in (own, even))
    assert kept >= 0.97
    assert lost <= 0.75


def test_a_plan_that_cuts_the_heads_that_look_up_is_refused(
    retriever: retrieval.Retriever,
) -> None:
    with pytest.raises(LossGuardError, match="the held-out loss rises by") as caught:
        retrieval.planned(retriever, budget=0.2, guard=0.05)
    assert isinstance(caught.value, PlanError)
    refused: SpanPlan = caught.value.plan
    assert refused.loss_change > 1
    full = retrieval.accuracy(retriever)
    assert retrieval.accuracy(compiled(retriever, refused)) < 0.8 * full


def test_a_plan_says_what_was_measured(retriever: retrieval.Retriever, found: SpanPlan) -> None:
    assert SpanPlan.from_json(found.to_json()) == found
    assert [layer.name for layer in found.layers] == ["layers.0", "layers.1"]
    assert found.lengths == (retrieval.LENGTH,)
    assert all(len(set(layer.rules)) <= 2 for layer in found.layers)
    (row,) = found.losses
    batches = [retrieval.repeats(-20 - i, 64) for i in range(2)]
    model = compiled(retriever, found)
    with torch.no_grad():
        exact = [float(retrieval.loss(retriever, batch)) for batch in batches]
        mine = [float(retrieval.loss(model, batch)) for batch in batches]
    assert row.full == pytest.approx(sum(exact) / 2, rel=1e-4)
    assert row.sparse == pytest.approx(sum(mine) / 2, rel=1e-3)


def test_the_same_data_give_the_same_plan(retriever: retrieval.Retriever, found: SpanPlan) -> None:
    assert retrieval.planned(retriever) == found


class Block(nn.Module):
    """Grouped causal attention, in one of several spellings."""

    def __init__(self, how: str = "told", queries: int = 4, heads: int = 2) -> None:
        super().__init__()
        self.how, self.heads, self.width = how, (queries, heads, heads), WIDTH // queries
        self.project = nn.Linear(WIDTH, self.width * sum(self.heads), bias=False)

    def forward(self, x: Tensor) -> Tensor:
        packed = self.project(x).unflatten(-1, (-1, self.width)).transpose(1, 2)
        q, k, v = torch.split(packed, list(self.heads), 1)
        group, n = self.heads[0] // self.heads[1], x.shape[1]
        if self.how != "told":
            k, v = (t.repeat_interleave(group, 1) for t in (k, v))
        mask = None
        if self.how == "mask":
            mask = torch.ones(n, n, dtype=torch.bool).tril()
        if self.how == "bias":
            mask = torch.full((1, 1, n, n), torch.finfo(q.dtype).min, dtype=q.dtype).triu(1)
        if self.how == "padding":
            mask = torch.ones(n, n, dtype=torch.bool).tril()
            mask[:, 0] = False
            mask[0, 0] = True
        y = F.scaled_dot_product_attention(
            q,
            k,
            v,
            mask,
            is_causal=self.how != "whole" and mask is None,
            enable_gqa=self.how == "told",
        )
        return x + y.transpose(1, 2).flatten(2)


class Model(nn.Module):
    """Token ids to a loss."""

    def __init__(self, *blocks: nn.Module) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(WORDS, WIDTH)
        self.blocks = nn.Sequential(*blocks)
        self.dropout = nn.Dropout(0.5)
        self.head = nn.Linear(WIDTH, WORDS)

    def forward(self, ids: Tensor) -> Tensor:
        logits = self.head(self.dropout(self.blocks(self.embed(ids))))
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def model(*hows: str) -> Model:
    torch.manual_seed(1)
    return Model(*map(Block, hows or ("told", "told")))


def data(*lengths: int, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, WORDS, (2, n), generator=generator) for n in lengths or (32, 32)]


def plan_of(given: nn.Module, batches: Any = None, **options: Any) -> SpanPlan:
    arguments: Any = {"holdout": data(32, seed=1), "block": 4, "sinks": 4, "guard": 1.0}
    return calibrate(given, batches or data(), **(arguments | options))


@pytest.mark.parametrize("how", ["told", "expanded", "mask", "bias"])
def test_heads_of_keys_are_found_in_every_spelling(how: str) -> None:
    plan = plan_of(model(how))
    (layer,) = plan.layers
    assert (layer.name, layer.query_heads, layer.heads) == ("blocks.0", 4, 2)
    assert (layer.width, len(layer.rules)) == (8, 2)
    assert layer == plan_of(model("told")).layers[0]


def test_what_is_not_causal_gets_no_rules() -> None:
    plan = plan_of(model("told", "whole", "padding"))
    assert [bool(layer.rules) for layer in plan.layers] == [True, False, False]
    assert plan.layers[1].name == "blocks.1"


def test_heads_that_are_too_wide_get_no_rules() -> None:
    class Wide(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            wide = x.repeat(1, 1, 9)[:, None]  # 288 entries
            y = F.scaled_dot_product_attention(wide, wide, wide, is_causal=True)
            return y[:, 0, :, :WIDTH]

    given = Model(Wide(), Block())
    plan = plan_of(given)
    assert [bool(layer.rules) for layer in plan.layers] == [False, True]
    (ids,) = data(32, seed=1)
    given.eval()
    assert compiled(given, plan)(ids).item() == pytest.approx(plan.losses[0].sparse, rel=1e-5)


@pytest.mark.parametrize("how", ["whole", "padding"])
def test_a_model_without_causal_attention_is_refused(how: str) -> None:
    with pytest.raises(ConfigError, match="none is causal self-attention"):
        plan_of(model(how))


def test_a_model_that_calls_no_attention_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"0 calls of scaled_dot_product_attention"):
        plan_of(Model(nn.Linear(WIDTH, WIDTH)))


def test_the_model_is_left_as_it_was() -> None:
    given = model()
    given.train()
    given.blocks.eval()
    before = {name: value.clone() for name, value in given.state_dict().items()}
    state = torch.get_rng_state()
    plan_of(given)
    assert given.training
    assert not given.blocks.training
    assert all(parameter.grad is None for parameter in given.parameters())
    assert all(torch.equal(value, before[name]) for name, value in given.state_dict().items())
    assert torch.equal(state, torch.get_rng_state())
    assert F.scaled_dot_product_attention is torch.nn.functional.scaled_dot_product_attention


def test_a_frozen_model_is_profiled_as_a_trained_one() -> None:
    assert plan_of(model().requires_grad_(False)) == plan_of(model())


def test_a_compiled_model_is_profiled_without_its_code() -> None:
    given = model()
    expected = plan_of(given)
    given.compile(backend="memopt", options={"lowering": "eager"})
    assert plan_of(given) == expected


def test_errors_are_those_of_each_head() -> None:
    given = model("told").double()
    plan = plan_of(given)
    (layer,) = plan.layers
    (ids,) = data(32, seed=1)
    block: Any = given.blocks[0]
    with torch.no_grad():
        packed = block.project(given.embed(ids)).unflatten(-1, (-1, 8)).transpose(1, 2)
        q, k, v = packed.split((4, 2, 2), 1)
        full = masked(q, k, v, [32, 32], 0)
        off = masked(q, k, v, layer.spans(32), plan.sinks) - full
    expected = [
        float(off[:, 2 * h : 2 * h + 2].norm() / full[:, 2 * h : 2 * h + 2].norm()) for h in (0, 1)
    ]
    assert layer.errors == pytest.approx(expected, rel=1e-3)


def test_the_budget_holds_at_every_length() -> None:
    plan = plan_of(
        model(), data(16, 32, 64), holdout=data(96, seed=1), budget=0.4, lengths=(16, 32, 64)
    )
    assert plan.lengths == (16, 32, 64)
    assert plan.longest == 96
    assert all(plan.density(n) <= 0.4 + 1e-6 for n in plan.lengths)
    assert [row.length for row in plan.losses] == [96]


def test_a_model_that_attends_twice_in_a_module_has_two_names() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = Block()

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.block(self.block(x))
            return y

    given = Model(Twice())
    plan = plan_of(given)
    assert [layer.name for layer in plan.layers] == ["blocks.0.block", "blocks.0.block#1"]
    (ids,) = data(32, seed=1)
    given.eval()
    assert compiled(given, plan)(ids).item() == pytest.approx(plan.losses[0].sparse, rel=1e-5)


@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_models_of_transformers_are_profiled_and_run_under_their_plan(name: str) -> None:
    made: tuple[Any, Any] = MODELS[name].make()
    given, inputs = made[0].eval(), made[1]
    plan = calibrate(given, [inputs], holdout=[inputs], block=8, sinks=8, budget=0.5, guard=1.0)
    assert len(plan.layers) == given.config.num_hidden_layers
    assert {(layer.query_heads, layer.heads) for layer in plan.layers} == {(4, 2)}
    with torch.no_grad():
        loss = float(compiled(given, plan)(**inputs).loss)
    assert loss == pytest.approx(plan.losses[0].sparse, rel=1e-5)
    assert plan.loss_change != 0


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"budget": 0}, "budget=0"),
        ({"budget": 1.5}, "budget=1.5"),
        ({"budget": "0.5"}, "budget='0.5'"),
        ({"budget": 0.01}, "least density is"),
        ({"guard": -0.1}, "guard=-0.1"),
        ({"block": 0}, "block=0"),
        ({"block": 2.0}, "block=2.0"),
        ({"sinks": -4}, "sinks=-4"),
        ({"kinds": ("spiral",)}, "unknown kind of rule 'spiral'"),
        ({"kinds": ()}, r"kinds=\(\)"),
        ({"kinds": "elastic"}, "kinds='elastic'"),
        ({"holdout": []}, "0 held-out"),
        ({"lengths": (64,)}, r"lengths=\[64\]: the batches have \[32\]"),
        ({"loss": lambda m, ids: m.embed(ids)}, "a scalar loss is needed"),
    ],
)
def test_a_value_that_cannot_be_is_refused(options: Any, why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        plan_of(model("told"), **options)


@pytest.mark.parametrize("rest", [0.0, 1.0])
def test_a_loss_that_is_not_finite_is_refused(rest: float) -> None:
    """Of batches that are profiled, and of those that are held out."""

    def loss(given: Any, ids: Tensor) -> Tensor:
        value: Tensor = given(ids) * (torch.nan if float(ids[0, 0] % 2) == rest else 1.0)
        return value

    ids = data(32)[0]
    (even, odd) = (ids.clone(), ids.clone())
    even[0, 0], odd[0, 0] = 0, 1
    with pytest.raises(ConfigError, match=r"is nan.*finite"):
        plan_of(model("told"), [even], holdout=[odd], loss=loss)


def test_a_plan_whose_loss_is_no_number_is_not_the_best() -> None:
    given, calls = model("told"), [0]

    def loss(m: Any, ids: Tensor) -> Tensor:
        calls[0] += 1  # to profile, in full, and under a plan
        value: Tensor = m(ids) * (torch.nan if calls[0] > 2 else 1.0)
        return value

    with pytest.raises(LossGuardError, match="rises by nan"):
        plan_of(given, data(32), loss=loss)


def test_the_guard_holds_for_losses_below_zero() -> None:
    given = model("told")
    plan = plan_of(given, loss=lambda m, ids: m(ids) - 100.0)
    (row,) = plan.losses
    assert row.full < 0
    assert (plan.loss_change > 0) == (row.sparse > row.full)


def test_a_model_that_returns_no_loss_is_refused() -> None:
    with pytest.raises(ConfigError, match="a scalar loss is needed"):
        plan_of(retrieval.Retriever())


def test_a_bar_appears_on_a_terminal_only_and_only_where_it_takes_long() -> None:
    def drawn(quiet: float, terminal: bool) -> str:
        console = Console(file=io.StringIO(), force_terminal=terminal, width=60)
        assert list(progress.advancing("profile", range(3), console, quiet)) == [0, 1, 2]
        text: Any = console.file
        return str(text.getvalue())

    assert "profile" in drawn(0.0, terminal=True)
    assert drawn(60.0, terminal=True) == drawn(0.0, terminal=False) == ""


def test_influence_is_a_mean_over_sequences_and_batches() -> None:
    given = model("told").eval()
    (ids,) = data(32)
    (once,) = profiled(given, [ids], loss_of, 4)
    for batches in ([ids.repeat(3, 1)], [ids, ids], list(ids[:, None])):
        (other,) = profiled(given, batches, loss_of, 4)
        torch.testing.assert_close(other.maps[32], once.maps[32], rtol=1e-4, atol=1e-8)


def test_plans_of_other_data_differ_in_their_hash() -> None:
    given = model("told")
    one, other = plan_of(given, data(32)), plan_of(given, data(32, seed=5))
    assert one.data_hash != other.data_hash
    assert dataclasses.replace(one, data_hash="") == dataclasses.replace(
        plan_of(given, data(32)), data_hash=""
    )
