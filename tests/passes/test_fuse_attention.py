"""Attention that is written out becomes one call, with eager's numbers and fewer bytes."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import memopt
from bench.zoo import MODELS
from memopt.remarks import RemarkKind
from tests.passes import attention_forms as forms
from tests.passes.attention_forms import FORMS, Form
from tests.passes.fusing import Fused
from tests.references import assert_within_reference_error, run
from tests.training import assert_trains_within_reference_error, in_float64

BATCH, HEADS, LENGTH, WIDTH = 2, 4, 24, 16
NAME = "fuse_attention"
CALL = F.scaled_dot_product_attention
DTYPES = (torch.float32, torch.bfloat16)


def compiled(function: Callable[..., Any]) -> Fused:
    return Fused(function, NAME, cpu=None)


def draw(
    dtype: torch.dtype = torch.float32, heads: int = HEADS, length: int = LENGTH
) -> list[Tensor]:
    shapes = [(BATCH, h, length, WIDTH) for h in (HEADS, heads, heads)]
    return [torch.randn(shape, dtype=dtype) for shape in shapes]


def assert_fused(
    function: Form, *, heads: int = HEADS, dtype: torch.dtype = torch.float32
) -> Fused:
    """One call is in the graph, and results and gradients over many inputs are near to the truth.

    Within three times the error of what is written out, as torch's own check of compiled models.
    """
    torch.manual_seed(0)
    fused = compiled(function)
    sides: list[list[list[Tensor]]] = [[], [], []]
    functions: tuple[Form, ...] = (fused, function, function)
    for _ in range(6):
        given = draw(dtype, heads)
        upstream = torch.randn_like(function(*given))
        wide = [x.double() for x in given]
        for side, f, own, up in zip(
            sides,
            functions,
            (given, wide, given),
            (upstream, upstream.double(), upstream),
            strict=True,
        ):
            side.append(run(f, own, up))
    stacked = [[torch.stack(all_) for all_ in zip(*side, strict=True)] for side in sides]
    assert [t.dtype for t in stacked[0]] == [t.dtype for t in stacked[2]]
    assert_within_reference_error(*stacked, times=3.0)
    assert fused.rewrites == 1, fused.record.remarks
    assert len(fused.calls(CALL)) == 1
    assert not [n for n in fused.graph.nodes if "softmax" in str(n.target)]
    return fused


def assert_left(function: Callable[..., Any], given: Sequence[Tensor], why: str) -> None:
    """Nothing is rewritten, and the reason is given; the numbers are those of eager."""
    fused = compiled(function)
    trained = [x.requires_grad for x in given]
    actual, expected = (run(f, given, trained=trained) for f in (fused, function))
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, other, equal_nan=True, rtol=0, atol=0)
    assert fused.rewrites == 0
    texts = [remark.text for remark in fused.said(RemarkKind.MISSED)]
    assert texts if why else not texts
    assert all(why in text for text in texts), texts


@pytest.mark.parametrize("form", FORMS)
def test_every_spelling_becomes_one_call(form: Form) -> None:
    fused = assert_fused(form)
    (remark,) = fused.said(RemarkKind.APPLIED)
    assert "held for the backward" in remark.text
    assert remark.source


@pytest.mark.parametrize("form", [forms.plain, forms.upcast, forms.by_bmm, forms.filled])
def test_sixteen_bits_are_no_further_from_the_truth(form: Form) -> None:
    assert_fused(form, dtype=torch.bfloat16)


def test_heads_that_were_repeated_are_read_as_they_are() -> None:
    fused = assert_fused(forms.repeated, heads=2)
    (call,) = fused.calls(CALL)
    assert call.kwargs["is_causal"]
    assert call.kwargs["enable_gqa"]
    assert not [n for n in fused.graph.nodes if "expand" in str(n.target)]


@pytest.mark.parametrize(
    "form",
    [forms.added, forms.filled, forms.filled_in_place, forms.chosen, forms.by_baddbmm,
     forms.by_bmm, forms.by_einsum_of_positions],
)  # fmt: skip
def test_a_causal_mask_is_proven_in_every_spelling(form: Form) -> None:
    fused = compiled(form)
    fused(*draw())
    (call,) = fused.calls(CALL)
    assert call.kwargs["is_causal"]
    assert call.kwargs.get("attn_mask") is None


def saved_bytes(function: Callable[..., Any], on: bool, given: Sequence[Tensor]) -> int:
    options = {"passes": {NAME: on}, "lowering": "eager", "strict": True}
    report = memopt.explain(function, *given, options=options)
    (graph,) = report.graphs
    return graph.saved_bytes


def test_probabilities_are_not_held() -> None:
    given = [x.requires_grad_() for x in draw(length=64)]
    own, other = (saved_bytes(forms.added, on, given) for on in (True, False))
    assert other - own >= BATCH * HEADS * 64 * 64 * 4 - given[0].nbytes - 64 * 64 * 4


# Masks that are inputs, by which a query may see no key.


def with_infinity(q: Tensor, k: Tensor, v: Tensor, shown: Tensor) -> Tensor:
    """Karpathy's lecture: a buffer's lower triangle."""
    scores = (q @ k.transpose(-2, -1) * 0.25).masked_fill(shown == 0, -math.inf)
    return scores.softmax(-1) @ v


def with_number(q: Tensor, k: Tensor, v: Tensor, shown: Tensor) -> Tensor:
    """The annotated Transformer."""
    scores = (q @ k.transpose(-2, -1) * 0.25).masked_fill(shown == 0, -1e18)
    return scores.softmax(-1) @ v


def with_two(q: Tensor, k: Tensor, v: Tensor, shown: Tensor) -> Tensor:
    scores = (q @ k.transpose(-2, -1) * 0.25).masked_fill(~forms.causal(q.shape[2]), -1e18)
    return scores.masked_fill(shown == 0, -1e18).softmax(-1) @ v


def masks() -> list[Tensor]:
    """By sequence, by query, by both and heads: some queries see no key."""
    torch.manual_seed(1)
    by_query = torch.rand(BATCH, 1, LENGTH, LENGTH) < 0.5
    by_query[0, :, 3] = False
    by_sequence = torch.ones(BATCH, 1, 1, LENGTH, dtype=torch.bool)
    by_sequence[1] = False
    return [torch.ones(LENGTH, LENGTH).tril(), by_query, by_sequence, torch.ones(LENGTH).bool()]


@pytest.mark.parametrize("mask", range(4))
@pytest.mark.parametrize("form", [with_infinity, with_number, with_two])
def test_a_query_that_sees_no_key_is_as_in_eager(form: Any, mask: int) -> None:
    torch.manual_seed(0)
    shown, given = masks()[mask], draw()
    fused = compiled(form)
    upstream = torch.randn_like(given[0])
    trained = [True, True, True, False]
    doubles = [x.double() for x in given]
    for own in ([*given, shown], [*doubles, shown]):
        up = upstream.to(own[0].dtype)
        actual, expected = (run(f, own, up, trained) for f in (fused, form))
        assert fused.rewrites == 1, fused.record.remarks
        tight = own[0].dtype == torch.float64
        for one, other in zip(actual, expected, strict=True):
            assert torch.equal(one.isnan(), other.isnan())
            rtol, atol = (1e-10, 1e-12) if tight else (1e-4, 1e-5)
            torch.testing.assert_close(one, other, equal_nan=True, rtol=rtol, atol=atol)


@pytest.mark.parametrize(
    ("fill", "dtype", "hides"),
    [
        (-1e9, torch.float32, True),
        (-1e9, torch.bfloat16, True),
        (-1e4, torch.bfloat16, True),
        (-1e4, torch.float32, False),
        (-1e9, torch.float64, False),
        (forms.LEAST, torch.float32, True),
    ],
)
def test_a_number_hides_where_its_neighbours_are_far(
    fill: float, dtype: torch.dtype, hides: bool
) -> None:
    def numbered(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (q @ k.mT).masked_fill(~forms.causal(q.shape[2]), fill).softmax(-1) @ v

    fused = compiled(numbered)
    fused(*draw(dtype))
    assert fused.rewrites == hides


def of_booleans(q: Tensor, k: Tensor, v: Tensor, shown: Tensor) -> Tensor:
    mask = torch.where(shown, torch.zeros((), dtype=q.dtype), forms.least(q))
    return torch.softmax(q @ k.transpose(2, 3) * 0.25 + mask, -1) @ v


def of_numbers(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    return torch.softmax(q @ k.transpose(2, 3) * 0.25 + mask, -1) @ v


@pytest.mark.parametrize("lowest", [forms.LEAST, -math.inf, None])
def test_without_gradients_a_mask_that_is_added_may_be_an_input(lowest: float | None) -> None:
    shown, form = masks()[1], of_booleans if lowest is None else of_numbers
    given = (*draw(), shown)
    if lowest is not None:
        given = (*draw(), torch.zeros(shown.shape).masked_fill(~shown, lowest))
    fused = compiled(form)
    with torch.no_grad():
        torch.testing.assert_close(fused(*given), form(*given), equal_nan=True)
    assert fused.rewrites == 1
    assert_left(form, [*(x.requires_grad_() for x in given[:3]), given[3]], "may see no key")


def test_one_graph_serves_every_length() -> None:
    fused = compiled(with_infinity)
    for length in (8, 20, 12):
        given = draw(torch.float64, length=length)
        shown = torch.ones(length, length).tril()
        for x in given:
            torch._dynamo.mark_dynamic(x, 2)
        torch._dynamo.mark_dynamic(shown, 0)
        torch._dynamo.mark_dynamic(shown, 1)
        own = [*given, shown]
        torch.testing.assert_close(fused(*own), with_infinity(*own))
    assert fused.graphs == fused.rewrites == 1


# What is left alone.


def returned(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    p = torch.softmax(q @ k.mT, -1)
    return torch.cat([p @ v, p], -1)


def scores_read(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ k.mT
    return scores.softmax(-1) @ v + scores.square().mean()


def dropped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    torch.manual_seed(0)
    return F.dropout((q @ k.mT).softmax(-1), 0.5) @ v


def capped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (torch.tanh(q @ k.mT / 5) * 5).softmax(-1) @ v


def partly_wide(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q.double() @ k.double().mT).softmax(-1).float() @ v


def doubled_keys(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ k.mT
    v = v * 1
    p = scores.softmax(-1)
    return p @ v.mul_(2) + v.mean()


def overwritten(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    k = k * 1
    scores = (q @ k.mT).detach()
    k.mul_(2)
    return scores.softmax(-1) @ v + k.mean() + q.mean()


def overwritten_mask(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    mask = torch.zeros(q.shape[2], q.shape[2])
    scores = q @ k.mT + mask
    mask += 1
    return scores.softmax(-1) @ v + mask.mean()


def over_queries(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT).softmax(-2) @ v


def without_gradient(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with torch.no_grad():
        p = (q @ k.mT).softmax(-1)
    return p @ v + q.mean() + k.mean()


def hidden_by_little(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT).masked_fill(~forms.causal(q.shape[2]), -20.0).softmax(-1) @ v


def nothing_shown(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    mask = torch.zeros(q.shape[2], q.shape[2]).masked_fill(
        ~forms.causal(q.shape[2]).tril(-1), -1e9
    )
    return (q @ k.mT + mask).softmax(-1) @ v


def wider_values(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT).softmax(-1) @ torch.cat([v, v], -1)


def counted(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT + forms.causal(q.shape[2])).softmax(-1) @ v


def of_one_sequence(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Heads and sequences in one dimension, and keys of one of them for all."""
    q, k, v = (x.flatten(0, 1) for x in (q, k, v))
    scores = (q @ k[:1].mT).view(BATCH, HEADS, LENGTH, LENGTH) * 0.25
    return scores.softmax(-1).view(-1, LENGTH, LENGTH) @ v


def rounded(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = (q @ k.mT).double().masked_fill(~forms.causal(q.shape[2]), -1e300)
    return scores.float().softmax(-1) @ v


def mapped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.vmap(forms.plain)(q[None], k[None], v[None])


@pytest.mark.parametrize(
    ("form", "why"),
    [
        (returned, "are read by"),
        (scores_read, "also read by"),
        (dropped, "at random"),
        (capped, "tanh"),
        (partly_wide, "dtypes"),
        (overwritten_mask, "overwrites"),
        (over_queries, "dimension"),
        (without_gradient, "no gradient"),
        (hidden_by_little, "-20"),
        (nothing_shown, "no key"),
        (wider_values, "width"),
        (counted, "torch.bool"),
        (rounded, "rounded"),
        (of_one_sequence, "batch"),
        (overwritten, "detach"),
        (mapped, "transform"),
    ],
)
def test_what_is_something_else_is_left_alone(form: Form, why: str) -> None:
    torch.manual_seed(0)
    assert_left(form, [x.requires_grad_() for x in draw()], why)


def test_one_key_passes_no_gradient_to_queries_not_even_noise() -> None:
    """As a summary of a sequence attends, such as messages of inkling."""
    q, k, v = draw()
    given = [x.requires_grad_() for x in (q, k[..., :1, :], v[..., :1, :])]
    assert not run(forms.plain, given)[1].any()
    assert_left(forms.plain, given, "there is one key")


def test_a_share_that_is_known_at_run_time_alone_is_left_alone() -> None:
    """With ``dynamic=True`` Dynamo makes an input of every float, a dropout's among them."""
    share = 0.0

    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.dropout((q @ k.mT).softmax(-1), share) @ v

    options: dict[str, Any] = {"lowering": "eager", "strict": True}
    step = torch.compile(function, backend="memopt", options=options, dynamic=True)
    given = [x.double() for x in draw()]
    torch.testing.assert_close(step(*given), function(*given), rtol=1e-12, atol=1e-12)


def test_a_bias_that_is_trained_is_left_alone_and_a_fixed_one_is_not() -> None:
    def biased(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        return (q @ k.mT + bias).softmax(-1) @ v

    bias = torch.randn(1, HEADS, LENGTH, LENGTH)
    assert_left(biased, [*(x.requires_grad_() for x in draw()), bias.requires_grad_()], "trained")
    given = (*draw(), bias.detach())
    fused = compiled(biased)
    with torch.no_grad():
        torch.testing.assert_close(fused(*given), biased(*given))
    assert fused.rewrites == 1


def test_a_softmax_of_something_else_says_nothing() -> None:
    assert_left(lambda q: torch.softmax(q.relu(), -1) * 2, [draw()[0].requires_grad_()], "")


def test_values_that_are_written_to_in_between_have_eagers_numbers() -> None:
    given = [x.requires_grad_() for x in draw()]
    actual, expected = (run(f, given) for f in (compiled(doubled_keys), doubled_keys))
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_under_autocast_the_call_is_in_its_dtype() -> None:
    def run_once(function: Form) -> tuple[Tensor, ...]:
        torch.manual_seed(0)
        layers = [torch.randn(WIDTH, WIDTH, requires_grad=True) for _ in range(3)]
        x = torch.randn(BATCH, HEADS, LENGTH, WIDTH)

        def attend(x: Tensor) -> Tensor:
            return function(*(F.linear(x, w) for w in layers))

        step = compiled(attend) if function is forms.upcast else attend
        with torch.autocast("cpu", torch.bfloat16):
            y = step(x)
        if isinstance(step, Fused):
            assert step.rewrites == 1, step.record.remarks
        y.float().square().sum().backward()
        return (y.detach(), *(w.grad for w in layers if w.grad is not None))

    def eager(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return forms.upcast(q, k, v)

    for one, other in zip(run_once(forms.upcast), run_once(eager), strict=True):
        assert one.dtype == other.dtype
        torch.testing.assert_close(one, other, rtol=0.1, atol=0.1 * float(other.abs().max()))


# Models of transformers, with their eager attention.


def model(name: str) -> tuple[Callable[[], nn.Module], dict[str, Tensor]]:
    """Makes a small model, always with the same numbers; and the inputs of one call."""
    entry = MODELS[name]
    _, inputs = entry.make()

    def build() -> nn.Module:
        own: Any = entry.make()[0]
        own.set_attn_implementation("eager")
        for module in own.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
            for key in vars(module).keys() & {"attn_pdrop", "dropout_prob"}:
                setattr(module, key, 0.0)
        for key, parameter in own.named_parameters():
            if key.endswith(("key.bias", "k_proj.bias")):  # zero but for rounding
                parameter.requires_grad_(False)
        return own  # type: ignore[no-any-return]

    return build, inputs


@pytest.mark.parametrize(
    ("name", "calls", "left"),
    [
        ("llama", 2, 0),
        ("qwen3", 2, 0),
        ("gpt2", 2, 0),
        ("bert", 2, 0),
        ("vit", 2, 0),
        ("t5", 2, 4),
    ],
)
def test_eager_models_train_within_their_own_error(name: str, calls: int, left: int) -> None:
    build, inputs = model(name)
    mine, plain, wide = build(), build(), build().double()
    fused = compiled(lambda **own: mine(**own))
    assert_trains_within_reference_error(
        (fused, mine), (in_float64(wide), wide), (plain, plain), [inputs]
    )
    assert fused.rewrites == calls, fused.record.remarks
    missed = fused.said(RemarkKind.MISSED)
    assert len(missed) == left
    assert all("trained" in remark.text for remark in missed)


def test_padding_of_an_eager_model_that_trains_is_left_alone() -> None:
    build, inputs = model("llama")
    own: Any = build()
    plain: Any = build()
    both: tuple[Any, ...] = (compiled(lambda **given: own(**given)), plain)
    fused = both[0]
    padding = torch.ones_like(inputs["input_ids"])
    padding[0, :5] = 0
    inputs["attention_mask"] = padding
    with torch.no_grad():
        mine, expected = (f(**inputs).logits for f in both)
    assert fused.rewrites == 2
    torch.testing.assert_close(mine, expected, rtol=1e-4, atol=1e-5)
    fused(**inputs)
    assert fused.rewrites == 0
    assert all("may see no key" in remark.text for remark in fused.said(RemarkKind.MISSED))


@pytest.mark.parametrize(
    "form",
    [
        lambda q, k, v: (q @ k.mT + torch.tensor(0.5)).softmax(-1) @ v,
        lambda q, k, v: (q @ k.mT).masked_fill(torch.tensor(False), -1e9).softmax(-1) @ v,
    ],
)
def test_a_mask_of_one_number_is_left_alone(form: Form) -> None:
    assert_left(form, [x.requires_grad_() for x in draw()], "one number")
