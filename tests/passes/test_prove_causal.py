"""Masks that are constants: what they say is said without them, with eager's numbers."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import MistralConfig, MistralForCausalLM

import memopt
from bench.zoo import MODELS
from bench.zoo.hugging_face import llama
from memopt.passes.prove_causal import ProveCausal
from tests.training import gradients, train_step

BATCH, QUERIES, HEADS, LENGTH, WIDTH = 2, 4, 2, 40, 16
Mask = Callable[[int], Tensor]
STRICT: dict[str, Any] = {"strict": True}


def by_tril(n: int) -> Tensor:
    return torch.ones(n, n, dtype=torch.bool).tril()


def by_positions(n: int) -> Tensor:
    at = torch.arange(n)
    return (at[None, :] <= at[:, None]).expand(BATCH, 1, n, n)


def by_infinity(n: int) -> Tensor:
    return torch.full((n, n), -torch.inf).triu(1)


def by_least_number(n: int) -> Tensor:
    shown = torch.arange(n)[None] <= torch.arange(n)[:, None]
    return torch.zeros(n, n).masked_fill(~shown, torch.finfo(torch.float32).min)


def by_buffer(n: int) -> Tensor:
    mask = torch.zeros(n, n, dtype=torch.bool)
    mask[torch.arange(n)[:, None] >= torch.arange(n)] = True
    return mask


def all_shown(n: int) -> Tensor:
    return torch.arange(n)[None].expand(n, n) >= 0


def window(n: int) -> Tensor:
    at = torch.arange(n)
    return by_tril(n) & (at[None] > at[:, None] - 8)


def strictly(n: int) -> Tensor:
    return by_tril(n).roll(1, 0)


def less(n: int) -> Tensor:
    """Hidden by a number that hides nothing for sure."""
    return torch.full((n, n), -1e4).triu(1)


def drawn(n: int) -> Tensor:
    return torch.rand(n, n) < 2


def drawn_in_place(n: int) -> Tensor:
    return torch.empty(n, n).exponential_() >= 0


def attend(mask: Mask, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask(q.shape[2]).to(q.device))


def grouped(mask: Mask, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    k, v = (torch.repeat_interleave(x, QUERIES // HEADS, dim=1) for x in (k, v))
    return attend(mask, q, k, v)


def tensors(heads: int = QUERIES) -> list[Tensor]:
    torch.manual_seed(0)
    shapes = [(BATCH, h, LENGTH, WIDTH) for h in (QUERIES, heads, heads)]
    return [torch.randn(shape, requires_grad=True) for shape in shapes]


def compiled(function: Any, **options: Any) -> Any:
    torch._dynamo.reset()
    return torch.compile(function, backend="memopt", options={**STRICT, **options})


def said(function: Any, *arguments: Any, **options: Any) -> list[str]:
    report = memopt.explain(function, *arguments, options={**STRICT, **options})
    remarks = [r for graph in report.graphs for r in graph.remarks]
    return [r.text for r in remarks if r.pass_name == ProveCausal.name]


def assert_eagers(function: Any, given: list[Tensor]) -> None:
    expected, actual = function(*given), compiled(function)(*given)
    torch.testing.assert_close(actual, expected)
    wanted, mine = (torch.autograd.grad(y.square().sum(), given) for y in (expected, actual))
    for one, other in zip(mine, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mask", [by_tril, by_positions, by_infinity, by_least_number])
@pytest.mark.parametrize("form", [attend, grouped])
def test_a_causal_mask_goes(form: Any, mask: Mask) -> None:
    given = tensors(HEADS if form is grouped else QUERIES)
    assert_eagers(lambda *x: form(mask, *x), given)
    assert said(lambda *x: form(mask, *x), *given) == ["its mask is causal: it goes"]


def test_a_causal_mask_stays_where_a_cpu_drops_probabilities() -> None:
    def dropping(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, by_tril(LENGTH), dropout_p=0.5)

    (text,) = said(dropping, *tensors())
    assert text.startswith("its mask stays: causal, and no kernel drops probabilities")
    shown = compiled(dropping)(*tensors()[:2], torch.eye(LENGTH).expand(BATCH, QUERIES, -1, -1))
    assert shown.triu(1).count_nonzero() == 0  # still


def test_a_mask_that_hides_nothing_goes() -> None:
    assert_eagers(lambda *x: attend(all_shown, *x), tensors())
    assert said(lambda *x: attend(all_shown, *x), *tensors()) == ["its mask is whole: it goes"]


def two_documents(n: int) -> Tensor:
    document = torch.arange(n) // (n // 2)
    return by_tril(n) & (document[None] == document[:, None])


@pytest.mark.parametrize(
    ("mask", "form"),
    [(window, "a causal window of 8 keys"), (two_documents, "causal within 2 documents")],
)
def test_keys_are_not_repeated_beside_a_mask_that_stays(mask: Mask, form: str) -> None:
    given = tensors(HEADS)
    assert_eagers(lambda *x: grouped(mask, *x), given)
    (text,) = said(lambda *x: grouped(mask, *x), *given)
    assert text == f"its mask stays: {form}; keys and values are read once for a group of queries"


def test_a_mask_that_stays_is_held_once_for_all_layers() -> None:
    def layers(count: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        mask = window(q.shape[2])
        for _ in range(count):
            q = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return q

    def saved(count: int) -> int:
        report = memopt.explain(lambda *x: layers(count, *x), *tensors(), options=STRICT)
        (graph,) = report.graphs
        return graph.saved_bytes

    one, two, three = map(saved, (1, 2, 3))
    assert two - one == three - two
    assert two - one < 2 * tensors()[0].nbytes  # the result and its log-sum-exp


@pytest.mark.parametrize("mask", [window, strictly, less, drawn, drawn_in_place, by_buffer])
def test_other_masks_stay(mask: Mask) -> None:
    given = tensors()
    if mask is not strictly:  # of which a query sees nothing
        assert_eagers(lambda *x: attend(mask, *x), given)
    (text,) = said(lambda *x: attend(mask, *x), *given)
    assert text.startswith("its mask stays")


LONG = 1024


def long_tensors(heads: int = QUERIES, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    torch.manual_seed(0)
    return [
        torch.randn(1, h, LONG, 8, dtype=dtype, requires_grad=True)
        for h in (QUERIES, heads, heads)
    ]


def of_width(width: int) -> Mask:
    def mask(n: int) -> Tensor:
        at = torch.arange(n)
        return by_tril(n) & (at[None] > at[:, None] - width)

    return mask


def added(width: int) -> Mask:
    return lambda n: torch.zeros(n, n, dtype=torch.float64).masked_fill(
        ~of_width(width)(n), -torch.inf
    )


def in_groups(mask: Mask, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, mask(LONG), scale=0.3, enable_gqa=True)


def assert_long(function: Any, given: list[Tensor]) -> None:
    expected, actual = function(*given), compiled(function, lowering="eager")(*given)
    torch.testing.assert_close(actual, expected)
    wanted, mine = (torch.autograd.grad(y.square().sum(), given) for y in (expected, actual))
    for one, other in zip(mine, wanted, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("width", [1, 40, 700])
@pytest.mark.parametrize(
    ("form", "mask"),
    [(attend, of_width), (attend, added), (grouped, of_width), (in_groups, of_width)],
)
def test_a_long_window_goes(form: Any, mask: Any, width: int) -> None:
    given = long_tensors(QUERIES if form is attend else HEADS)
    assert_long(lambda *x: form(mask(width), *x), given)
    (text,) = said(lambda *x: form(mask(width), *x), *given, lowering="eager")
    assert text == f"its mask is a causal window of {width} keys: it goes, and no more are read"


def both_sides(n: int) -> Tensor:
    at = torch.arange(n)
    return (at[None] - at[:, None]).abs() < 40


@pytest.mark.parametrize(
    "attention",
    [
        lambda q, k, v: attend(both_sides, q, k, v),
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, of_width(9)(LONG), dropout_p=0.5),
        lambda q, k, v: F.scaled_dot_product_attention(q[0], k[0], v[0], of_width(9)(LONG)),
        lambda q, k, v: attend(of_width(9), q.repeat(1, 1, 1, 40), k.repeat(1, 1, 1, 40), v),
        lambda q, k, v: attend(of_width(9), q, k[:, :1], v),
        lambda q, k, v: attend(of_width(9), q, k, v[:, :1]),
        lambda q, k, v: attend(of_width(9), q[:, :1], k, v),
        lambda q, k, v: attend(of_width(9), q[:1], k[0], v[0]),
    ],
)
def test_what_is_no_window_for_the_operator_keeps_its_mask(attention: Any) -> None:
    (text,) = said(attention, *long_tensors(), lowering="eager", strict=True)
    assert text.startswith("its mask stays")


def test_a_window_under_autocast_has_eagers_dtype() -> None:
    def cast(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return attend(of_width(40), q, k, v)

    given = long_tensors(dtype=torch.float32)
    actual, expected = compiled(cast, lowering="eager")(*given), cast(*given)
    assert actual.dtype == expected.dtype
    torch.testing.assert_close(actual, expected)


def test_a_model_with_windows_holds_no_mask() -> None:
    config = MistralConfig(
        vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, sliding_window=64,
    )  # fmt: skip
    torch.manual_seed(0)
    model = MistralForCausalLM(config).double()
    ids = torch.randint(0, 64, (1, LONG))
    inputs: dict[str, Any] = {"input_ids": ids, "labels": ids}
    loss = model(**inputs).loss
    wanted = torch.autograd.grad(loss, list(model.parameters()))
    report = memopt.explain(model, options={**STRICT, "lowering": "eager"}, **inputs)
    (graph,) = report.graphs
    assert sum("a causal window of 64 keys: it goes" in r.text for r in graph.remarks) == 2
    mine = compiled(model, lowering="eager")(**inputs).loss
    torch.testing.assert_close(mine, loss)
    for one, other in zip(
        torch.autograd.grad(mine, list(model.parameters())), wanted, strict=True
    ):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-8)


def test_a_mask_that_is_overwritten_between_two_layers_is_read_twice() -> None:
    def twice(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        mask = by_tril(LENGTH)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        mask[:, :5] = True
        return y + F.scaled_dot_product_attention(q, k, v, attn_mask=mask)

    assert_eagers(twice, tensors())
    first, second = said(twice, *tensors())
    assert "causal" in first
    assert "writes to" in second


def test_a_mask_is_computed_in_its_own_dtype() -> None:
    def rounded(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            at = (torch.arange(300.0)[:, None] @ torch.ones(1, 1)).float()
        return F.scaled_dot_product_attention(q, k, v, attn_mask=at >= at.T)

    given = [torch.randn(1, 1, 300, 8) for _ in range(3)]
    torch.testing.assert_close(compiled(rounded)(*given), rounded(*given))


def test_compiling_draws_no_numbers() -> None:
    states = []
    for on in (True, False):
        torch.manual_seed(0)
        passes = {ProveCausal.name: on}
        compiled(lambda *x: attend(drawn, *x), passes=passes)(*tensors())
        states.append(torch.get_rng_state())
    assert torch.equal(*states)


def test_an_input_is_no_constant() -> None:
    padding = torch.ones(BATCH, 1, 1, LENGTH, dtype=torch.bool)

    def padded(q: Tensor, k: Tensor, v: Tensor, padding: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=by_tril(LENGTH) & padding)

    (text,) = said(padded, *tensors(), padding)
    assert "no constant" in text


def test_a_mask_for_fewer_queries_than_keys_stays() -> None:
    q, k, v = tensors()

    def later(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=by_tril(LENGTH)[-8:])

    assert_eagers(later, [q[:, :, :8].detach().requires_grad_(), k, v])


def test_sizes_that_are_not_numbers_are_left_alone() -> None:
    step = torch.compile(
        lambda *x: attend(by_positions, *x),
        backend="memopt",
        dynamic=True,
        options={"strict": True},
    )
    for n in (LENGTH, LENGTH // 2):
        given = [x[:, :, :n] for x in tensors()]
        torch.testing.assert_close(step(*given), attend(by_positions, *given))


def test_every_layer_of_a_compiled_model_is_told() -> None:
    layers = 3
    with torch.random.fork_rng():
        torch.manual_seed(0)
        recipe = llama(layers, 512, 64, 128, 4, 2, batch=2, length=64)
        model, inputs = recipe.build(), recipe.inputs(1)
    arguments: dict[str, Any] = dict(inputs)
    loss = train_step(model, model, inputs)
    expected = gradients(model)
    mine = train_step(compiled(model), model, inputs)
    torch.testing.assert_close(mine, loss)
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-3, atol=1e-5)
    held = []
    for on in (True, False):
        options: Any = {"passes": {"prove_causal": on}}
        (graph,) = memopt.explain(model, options=options, **arguments).graphs
        texts = [r.text for r in graph.remarks if r.pass_name == ProveCausal.name]
        assert texts.count("its mask is causal: it goes") == (layers if on else 0)
        held.append(graph.saved_bytes)
    mask, repeated = 64 * 64, layers * 2 * (2 * 2 * 64 * 16 * 4)
    assert held[1] - held[0] >= mask + repeated


def test_padding_given_to_a_model_is_seen() -> None:
    model, inputs = MODELS["llama"].make()
    padding = torch.ones_like(inputs["input_ids"])
    padding[0, :20] = 0
    with torch.no_grad():
        wanted = model(input_ids=inputs["input_ids"], attention_mask=padding).logits
        mine = compiled(model)(input_ids=inputs["input_ids"], attention_mask=padding).logits
    torch.testing.assert_close(mine[:, 20:], wanted[:, 20:], rtol=1e-4, atol=1e-5)
