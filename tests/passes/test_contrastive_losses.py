"""Contrastive losses in both directions: one operator, eager's numbers, no similarities whole."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.meter import Meter
from memopt.remarks import RemarkKind
from tests.passes.compiling import (
    argument,
    assert_as_eager,
    assert_close,
    assert_near_float64,
    compiled,
    options,
    rewritten,
    run,
    run_compiled,
)
from tests.passes.pairs import PAIRS, SIZE, Function, Inputs, autocast, both


def two_products(i: Inputs) -> Tensor:
    """As open_clip writes it."""
    x, y = F.normalize(i.x, dim=-1), F.normalize(i.y, dim=-1)
    scale = i.scale.exp()
    return both(scale * x @ y.T, scale * y @ x.T)


def transformers(i: Inputs) -> tuple[Tensor, ...]:
    """As Hugging Face's CLIP writes it, without what it returns."""
    x = i.x / i.x.norm(p=2, dim=-1, keepdim=True)
    y = i.y / i.y.norm(p=2, dim=-1, keepdim=True)
    z = torch.matmul(y, x.t().to(y.device))
    z = z * i.scale.exp().to(y.device)

    def contrastive_loss(logits: Tensor) -> Tensor:
        return F.cross_entropy(logits, torch.arange(len(logits), device=logits.device))

    return (contrastive_loss(z) + contrastive_loss(z.T)) / 2.0, x, y


def apart(i: Inputs, *, label_smoothing: float = 0.0, **change: Any) -> Tensor:
    z = i.scale * i.x @ i.y.T
    labels = torch.arange(PAIRS)
    a = F.cross_entropy(z, labels, label_smoothing=label_smoothing)
    return a + F.cross_entropy(z.T, labels, label_smoothing=label_smoothing, **change)


def weighed(i: Inputs) -> Tensor:
    z, labels = i.x @ i.y.T, torch.arange(0, PAIRS, 1)
    return 0.3 * F.cross_entropy(z, labels) + 0.3 * F.cross_entropy(z.T, labels)


def averaged(i: Inputs) -> Tensor:
    z, labels = i.x @ i.y.T, torch.arange(PAIRS).to("cpu")
    return torch.stack([F.cross_entropy(z, labels), F.cross_entropy(z.T, labels)]).mean() ** 2


FUSED: dict[str, Function] = {
    "two products": two_products,
    "transposed": lambda i: both(i.scale * (i.x @ i.y.t())),
    "transposed, mT": lambda i: both(z := i.scale * (i.x @ i.y.t()), z.mT),
    "transformers": lambda i: transformers(i)[0],
    "scaled by a number": lambda i: both(i.x @ i.y.T * 3.5),
    "divided by a number": lambda i: both(i.x @ i.y.T / 0.07),
    "divided by a trained temperature": lambda i: both(i.x @ i.y.T / i.scale),
    "number and tensor": lambda i: both(2.0 * (i.x / i.scale) @ i.y.T),
    "negative scale": lambda i: both(i.x @ i.y.T * -2.0),
    "scale with one dimension": lambda i: both(i.x @ i.y.T * i.scale.exp().view(1)),
    "linear": lambda i: both(F.linear(i.x, i.y)),
    "one matrix with itself": lambda i: both(i.x @ i.x.T),
    "one side detached": lambda i: both(i.x @ i.y.detach().T),
    "sum": apart,
    "weighed alike": weighed,
    "mean of a stack": averaged,
    "part of a larger loss": lambda i: both(i.x @ i.y.T).exp() + i.x.square().mean(),
    "twice": lambda i: both(i.x @ i.y.T) + 2 * both(i.y @ i.x.T * i.scale),
    "scaled by another loss": lambda i: both(i.x @ i.y.T * both(i.y @ i.x.T * 0.5)),
}


@pytest.mark.parametrize("form", FUSED)
def test_every_spelling_becomes_one_operator_with_eagers_numbers(form: str) -> None:
    function, inputs = FUSED[form], Inputs()
    record = assert_as_eager(function, inputs, chunk_rows=70)
    remarks = [r for r in record.remarks if r.pass_name == "chunk_losses"]
    assert {r.kind for r in remarks} == {RemarkKind.APPLIED}, remarks
    assert record.rewrites["chunk_losses"] == (
        2 if form in ("twice", "scaled by another loss") else 1
    )
    graph = rewritten(function, inputs)
    names = [str(node.target) for node in graph.nodes if "memopt" in str(node.target)]
    assert set(names) == {"memopt.contrastive.default"}
    values = [node.meta.get("example_value") for node in graph.nodes]
    assert max(v.numel() for v in values if isinstance(v, Tensor)) < PAIRS * PAIRS


def shifted_labels(i: Inputs) -> Tensor:
    """Classes of one rank of several; here of the first, which no graph can know."""
    z, labels = i.x @ i.y.T, torch.arange(PAIRS) + 0 * PAIRS
    return F.cross_entropy(z, labels) + F.cross_entropy(z.T, labels)


def overwritten_labels(i: Inputs) -> Tensor:
    z, labels = i.x @ i.y.T, torch.arange(PAIRS)
    labels[3] = 7
    return F.cross_entropy(z, labels) + F.cross_entropy(z.T, labels)


def reversed_labels(i: Inputs) -> Tensor:
    z, labels = i.x @ i.y.T, torch.arange(PAIRS - 1, -1, -1)
    return F.cross_entropy(z, labels) + F.cross_entropy(z.T, labels)


def one_read_twice(i: Inputs) -> Tensor:
    z, labels = i.x @ i.y.T, torch.arange(PAIRS)
    a, b = F.cross_entropy(z, labels), F.cross_entropy(z.T, labels)
    return a + b + a.square()


def unlike_weights(i: Inputs) -> Tensor:
    z, labels = i.x @ i.y.T, torch.arange(PAIRS)
    return 0.3 * F.cross_entropy(z, labels) + 0.7 * F.cross_entropy(z.T, labels)


def squares(i: Inputs) -> Tensor:
    z, labels = i.x @ i.y.T, torch.arange(PAIRS)
    a, b = F.cross_entropy(z, labels), F.cross_entropy(z.T, labels)
    return a * a + b * b


def accuracy(i: Inputs) -> Tensor:
    z = i.x @ i.y.T
    return both(z) + (z.argmax(-1) == torch.arange(PAIRS)).double().mean()


def partly_frozen(i: Inputs) -> Tensor:
    with torch.no_grad():
        x = i.x * i.scale
    return both(x @ i.y.T, i.y @ x.T)


def overwritten(i: Inputs) -> Tensor:
    x = i.x.detach() + 1.0
    z = i.scale * (x @ i.y.detach().T)
    x.mul_(2.0)
    return both(z) + x.sum()


APART: dict[str, tuple[Function, str]] = {
    "labels of another rank": (shifted_labels, "not seen to be arange(N)"),
    "labels overwritten": (overwritten_labels, "not seen to be arange(N)"),
    "labels the other way round": (reversed_labels, "not seen to be arange(N)"),
    "a class that is ignored": (lambda i: apart(i, ignore_index=3), "not seen to be arange(N)"),
    "smoothing": (lambda i: apart(i, label_smoothing=0.1), "weights, smoothing"),
    "sums": (lambda i: apart(i, reduction="sum"), "another reduction than mean"),
    "class weights": (lambda i: apart(i, weight=i.x[:, 0].detach()), "weights, smoothing"),
    "one loss read twice": (one_read_twice, "only read as their sum"),
    "unlike weights": (unlike_weights, "only read as their sum"),
    "squares": (squares, "only read as their sum"),
    "accuracy": (accuracy, "also read by argmax"),
    "scaled without gradient": (partly_frozen, "a part of the product has no gradient"),
    "embeddings overwritten": (overwritten, "overwrites an input"),
}


@pytest.mark.parametrize("form", APART)
def test_what_is_not_surely_the_same_is_not_fused_and_a_remark_says_why(form: str) -> None:
    function, reason = APART[form]
    record = assert_as_eager(function, Inputs())
    missed = [r.text for r in record.remarks if "both directions, not in one" in r.text]
    assert len(missed) == 1
    assert reason in missed[0]


NO_PAIR: dict[str, Function] = {
    "two scales": lambda i: both(i.scale * i.x @ i.y.T, i.y @ i.x.T),
    "two tensors": lambda i: both(i.scale * i.x @ i.y.T, i.y @ i.x.T / i.scale),
    "other embeddings": lambda i: both(i.x @ i.y.T, i.y @ (i.x + 1).T),
    "one direction": lambda i: F.cross_entropy(i.x @ i.y.T, torch.arange(PAIRS)),
    "a bias": lambda i: both(i.x @ i.y.T + i.x[:, 0], i.y @ i.x.T + i.x[:, 0]),
    "fewer queries": lambda i: F.cross_entropy(i.x[:9] @ i.y.T, torch.arange(9)),
}


@pytest.mark.parametrize("form", NO_PAIR)
def test_what_are_not_two_directions_is_served_as_before(form: str) -> None:
    record = assert_as_eager(NO_PAIR[form], Inputs())
    assert record.rewrites["chunk_losses"] > 0
    assert not any("both directions" in remark.text for remark in record.remarks)


def test_a_few_pairs_are_left_alone() -> None:
    _, (record,) = run_compiled(FUSED["transposed"], Inputs(pairs=64))
    assert record.rewrites["chunk_losses"] == 0


def test_without_gradients_the_operator_is_asked_for_none() -> None:
    inputs = Inputs()
    with torch.no_grad():
        graph = rewritten(two_products, inputs)
        actual, _ = run_compiled(two_products, inputs)
        torch.testing.assert_close(actual, two_products(inputs), rtol=1e-12, atol=1e-12)
    (node,) = (n for n in graph.nodes if "contrastive" in str(n.target))
    assert argument(node, "wanted") == [False, False, False]


def test_the_number_of_pairs_changes_without_a_recompilation() -> None:
    def function(x: Tensor, y: Tensor) -> Tensor:
        return both(x @ y.T)

    own, records = compiled(function, dynamic=True)
    for rows in (300, 280, 260):
        x, y = torch.randn(2, rows, SIZE, dtype=torch.float64)
        torch.testing.assert_close(own(x.clone(), y.clone()), both(x @ y.T))
    assert [record.rewrites["chunk_losses"] for record in records] == [1]


def same_product(i: Inputs) -> Tensor:
    """``two_products`` with one product for both directions, as the operator has it."""
    x, y = F.normalize(i.x, dim=-1), F.normalize(i.y, dim=-1)
    return both(i.scale.exp() * (x @ y.T))


@pytest.mark.parametrize("function", [two_products, same_product])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "autocast"])
def test_low_precision_is_as_near_to_float64_as_eager_with_one_product_is(
    dtype: str, function: Function
) -> None:
    seeds = iter(range(5))
    own: Function = function
    plain: Function = same_product
    if dtype == "autocast":
        own, plain = autocast(function), autocast(same_product)

    def draw() -> Inputs:
        torch.manual_seed(next(seeds))
        inputs = Inputs(torch.bfloat16 if dtype == "bfloat16" else torch.float32)
        inputs.scale.data.normal_()
        return inputs

    record = assert_near_float64(own, draw, plain=plain, exact=same_product)
    assert record.rewrites["chunk_losses"] == 1


class Clip(nn.Module):
    """Returns its similarities beside the loss."""

    def forward(self, i: Inputs) -> tuple[Tensor, Tensor, Tensor]:
        z = i.x @ i.y.T * i.scale
        return both(z), z, z.T


def test_returned_similarities_stay_whole_or_are_none_where_that_is_asked_for() -> None:
    inputs = Inputs()
    record = assert_as_eager(Clip(), inputs, logits="full")
    assert any("logits='full' keeps them whole" in r.text for r in record.remarks)
    own, records = compiled(Clip(), logits="none")
    assert own(inputs)[1:] == (None, None)
    (record,) = records
    assert record.rewrites["chunk_losses"] == 1

    def loss_of(function: Function) -> Function:
        return lambda i: function(i)[0]

    actual, expected = (run(loss_of(f), inputs) for f in (own, Clip()))
    torch.testing.assert_close(actual[0], expected[0], rtol=1e-12, atol=1e-12)
    assert_close(actual, expected)


def test_a_step_holds_no_similarities() -> None:
    rows = 1024
    inputs = Inputs(torch.float32, pairs=rows)
    own = torch.compile(two_products, backend="memopt", options=options())
    run(own, inputs)
    with Meter() as meter:
        run(own, inputs)
    assert meter.peak_bytes < rows * rows * 4
