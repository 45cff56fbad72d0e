"""Contrastive losses in both directions: one operator, eager's numbers, no similarities whole."""

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from bench.meter import Meter
from memopt.backend import read_options
from memopt.passes import PRE_GRAD
from memopt.pipeline import PassContext, Pipeline
from memopt.remarks import RemarkKind
from tests import references
from tests.passes.compiling import argument, assert_close, options, rewritten, run_compiled

PAIRS, SIZE = 300, 8


class Batch(NamedTuple):
    """Two kinds of embeddings `(PAIRS, SIZE)` and the logarithm of the scale."""

    x: Tensor
    y: Tensor
    scale: Tensor

    @classmethod
    def draw(cls, dtype: torch.dtype = torch.float64, *, seed: int = 0) -> "Batch":
        torch.manual_seed(seed)
        x, y = (torch.randn(PAIRS, SIZE, dtype=dtype, requires_grad=True) for _ in range(2))
        return cls(x, y, torch.tensor(1.7, dtype=dtype, requires_grad=True))


Function = Callable[[Batch], Any]


def both(z: Tensor, other: Tensor | None = None) -> Tensor:
    labels = torch.arange(len(z), device=z.device)
    other = z.t() if other is None else other
    return (F.cross_entropy(z, labels) + F.cross_entropy(other, labels)) / 2


def two_products(i: Batch) -> Tensor:
    """As open_clip writes it."""
    x, y = F.normalize(i.x, dim=-1), F.normalize(i.y, dim=-1)
    scale = i.scale.exp()
    return both(scale * x @ y.T, scale * y @ x.T)


def transformers(i: Batch) -> tuple[Tensor, ...]:
    """As Hugging Face's CLIP writes it, without what it returns."""
    x = i.x / i.x.norm(p=2, dim=-1, keepdim=True)
    y = i.y / i.y.norm(p=2, dim=-1, keepdim=True)
    z = torch.matmul(y, x.t().to(y.device))
    z = z * i.scale.exp().to(y.device)

    def contrastive_loss(logits: Tensor) -> Tensor:
        return F.cross_entropy(logits, torch.arange(len(logits), device=logits.device))

    return (contrastive_loss(z) + contrastive_loss(z.T)) / 2.0, x, y


def apart(i: Batch, *, label_smoothing: float = 0.0, **change: Any) -> Tensor:
    z = i.scale * i.x @ i.y.T
    labels = torch.arange(PAIRS)
    a = F.cross_entropy(z, labels, label_smoothing=label_smoothing)
    return a + F.cross_entropy(z.T, labels, label_smoothing=label_smoothing, **change)


def weighed(i: Batch) -> Tensor:
    z, labels = i.x @ i.y.T, torch.arange(0, PAIRS, 1)
    return 0.3 * F.cross_entropy(z, labels) + 0.3 * F.cross_entropy(z.T, labels)


def averaged(i: Batch) -> Tensor:
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


def gradients(value: Tensor, batch: Batch) -> list[Tensor | None]:
    return list(torch.autograd.grad(value, list(batch), allow_unused=True))


@pytest.mark.parametrize("form", FUSED)
def test_every_spelling_becomes_one_operator_with_eagers_numbers(form: str) -> None:
    function, batch = FUSED[form], Batch.draw()
    expected = function(batch)
    wanted = gradients(expected, batch)
    actual, (record,) = run_compiled(function, batch, chunk_rows=70)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)
    assert_close(gradients(actual, batch), wanted)
    remarks = [r for r in record.remarks if r.pass_name == "chunk_losses"]
    assert {r.kind for r in remarks} == {RemarkKind.APPLIED}, remarks
    assert record.rewrites["chunk_losses"] == (
        2 if form in ("twice", "scaled by another loss") else 1
    )
    graph = rewritten(function, batch)
    names = [str(node.target) for node in graph.nodes if "memopt" in str(node.target)]
    assert set(names) == {"memopt.contrastive.default"}
    values = [node.meta.get("example_value") for node in graph.nodes]
    assert max(v.numel() for v in values if isinstance(v, Tensor)) < PAIRS * PAIRS


def shifted_labels(i: Batch) -> Tensor:
    """Classes of one rank of several; here of the first, which no graph can know."""
    z, labels = i.x @ i.y.T, torch.arange(PAIRS) + 0 * PAIRS
    return F.cross_entropy(z, labels) + F.cross_entropy(z.T, labels)


def overwritten_labels(i: Batch) -> Tensor:
    z, labels = i.x @ i.y.T, torch.arange(PAIRS)
    labels[3] = 7
    return F.cross_entropy(z, labels) + F.cross_entropy(z.T, labels)


def reversed_labels(i: Batch) -> Tensor:
    z, labels = i.x @ i.y.T, torch.arange(PAIRS - 1, -1, -1)
    return F.cross_entropy(z, labels) + F.cross_entropy(z.T, labels)


def one_read_twice(i: Batch) -> Tensor:
    z, labels = i.x @ i.y.T, torch.arange(PAIRS)
    a, b = F.cross_entropy(z, labels), F.cross_entropy(z.T, labels)
    return a + b + a.square()


def unlike_weights(i: Batch) -> Tensor:
    z, labels = i.x @ i.y.T, torch.arange(PAIRS)
    return 0.3 * F.cross_entropy(z, labels) + 0.7 * F.cross_entropy(z.T, labels)


def squares(i: Batch) -> Tensor:
    z, labels = i.x @ i.y.T, torch.arange(PAIRS)
    a, b = F.cross_entropy(z, labels), F.cross_entropy(z.T, labels)
    return a * a + b * b


def accuracy(i: Batch) -> Tensor:
    z = i.x @ i.y.T
    return both(z) + (z.argmax(-1) == torch.arange(PAIRS)).double().mean()


def partly_frozen(i: Batch) -> Tensor:
    with torch.no_grad():
        x = i.x * i.scale
    return both(x @ i.y.T, i.y @ x.T)


def overwritten(i: Batch) -> Tensor:
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
    batch = Batch.draw()
    torch.manual_seed(1)
    expected = function(batch)
    wanted = gradients(expected, batch)
    torch.manual_seed(1)
    actual, (record,) = run_compiled(function, batch)
    missed = [r.text for r in record.remarks if "both directions, not in one" in r.text]
    assert len(missed) == 1
    assert reason in missed[0]
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)
    assert_close(gradients(actual, batch), wanted)


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
    batch = Batch.draw()
    expected = NO_PAIR[form](batch)
    wanted = gradients(expected, batch)
    actual, (record,) = run_compiled(NO_PAIR[form], batch)
    assert record.rewrites["chunk_losses"] > 0
    assert not any("both directions" in remark.text for remark in record.remarks)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)
    assert_close(gradients(actual, batch), wanted)


def test_a_few_pairs_are_left_alone() -> None:
    batch = Batch(*(t[:64] if t.dim() else t for t in Batch.draw()))
    _, (record,) = run_compiled(FUSED["transposed"], batch)
    assert record.rewrites["chunk_losses"] == 0


def test_without_gradients_the_operator_is_asked_for_none() -> None:
    batch = Batch.draw()
    with torch.no_grad():
        graph = rewritten(two_products, batch)
        actual, _ = run_compiled(two_products, batch)
        torch.testing.assert_close(actual, two_products(batch), rtol=1e-12, atol=1e-12)
    (node,) = (n for n in graph.nodes if "contrastive" in str(n.target))
    assert argument(node, "wanted") == [False, False, False]


def test_the_number_of_pairs_changes_without_a_recompilation() -> None:
    frames = []

    def backend(gm: fx.GraphModule, inputs: Any) -> Any:
        frames.append(gm)
        Pipeline("pre_grad", PRE_GRAD).run(gm, PassContext(read_options(options())))
        assert any("contrastive" in str(node.target) for node in gm.graph.nodes)
        return gm.forward

    def function(x: Tensor, y: Tensor) -> Tensor:
        return both(x @ y.T)

    compiled: Any = torch.compile(function, backend=backend, dynamic=True)
    for rows in (300, 280, 260):
        x, y = torch.randn(2, rows, SIZE, dtype=torch.float64)
        torch.testing.assert_close(compiled(x.clone(), y.clone()), both(x @ y.T))
    assert len(frames) == 1


def autocast(function: Function) -> Function:
    def run(i: Batch) -> Any:
        with torch.autocast("cpu", torch.bfloat16):
            return function(i)

    return run


def same_product(i: Batch) -> Tensor:
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

    def draw() -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        batch = Batch.draw(torch.bfloat16 if dtype == "bfloat16" else torch.float32)
        torch.manual_seed(next(seeds))
        batch = Batch(*(t.detach().normal_().requires_grad_() for t in batch))
        exact = Batch(*(t.detach().double().requires_grad_() for t in batch))
        value, (record,) = run_compiled(own, batch)
        assert record.rewrites["chunk_losses"] == 1
        results = (value, batch), (same_product(exact), exact), (plain(batch), batch)
        a, b, c = ([v.detach(), *torch.autograd.grad(v, list(leaves))] for v, leaves in results)
        assert [t.dtype for t in a] == [t.dtype for t in c]
        return a, b, c

    references.assert_draws_within_reference_error(draw)


class Clip(nn.Module):
    """Returns its similarities beside the loss."""

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        z = batch.x @ batch.y.T * batch.scale
        return both(z), z, z.T


def test_returned_similarities_stay_whole_or_are_none_where_that_is_asked_for() -> None:
    batch = Batch.draw()
    expected = Clip()(batch)
    kept, (record,) = run_compiled(Clip(), batch, logits="full")
    assert any("logits='full' keeps them whole" in r.text for r in record.remarks)
    torch.testing.assert_close(kept, expected)
    (loss, *rest), (record,) = run_compiled(Clip(), batch, logits="none")
    assert rest == [None, None]
    assert record.rewrites["chunk_losses"] == 1
    torch.testing.assert_close(loss, expected[0], rtol=1e-12, atol=1e-12)
    assert_close(gradients(loss, batch), gradients(expected[0], batch))


def test_a_step_holds_no_similarities() -> None:
    rows = 1024
    torch.manual_seed(0)
    x, y = (torch.randn(rows, 16, requires_grad=True) for _ in range(2))
    batch = Batch(x, y, torch.tensor(1.0, requires_grad=True))
    compiled: Any = torch.compile(two_products, backend="memopt", options=options())
    torch.autograd.grad(compiled(batch), list(batch))
    with Meter() as meter:
        torch.autograd.grad(compiled(batch), list(batch))
    assert meter.peak_bytes < rows * rows * 4
