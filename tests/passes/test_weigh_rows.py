"""Losses by rows with constant weights: eager's numbers, and the logits made once."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from memopt.kernels import linear_cross_entropy, weighted_rows
from tests.passes import one_head
from tests.passes.compiling import (
    assert_as_eager,
    assert_declined,
    assert_near_float64,
    compiled,
    converted,
    rewritten,
    run,
)
from tests.passes.one_head import BATCH, CLASSES, TOKENS, flat, log_probs, selected
from tests.references import assert_same_bits
from tests.scratch import assert_scratch_is


class Inputs(one_head.Inputs):
    """With a teacher's logits, weights of tokens, and a mask of zeros and ones."""

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        super().__init__(dtype)
        self.teacher = torch.randn(*BATCH, CLASSES).to(dtype)
        self.weights = self.mask
        self.mask = (torch.rand(BATCH) < 0.6).to(dtype)

    def logits(self) -> Tensor:
        return F.linear(self.x, self.w, self.b)


Function = Callable[[Inputs], Any]


def ce(i: Inputs, **options: Any) -> Tensor:
    """Losses of tokens, `(TOKENS,)`."""
    z = i.logits().view(-1, CLASSES)
    return F.cross_entropy(z, i.y.view(-1), reduction="none", **options)


def kl(i: Inputs) -> Tensor:
    """Divergences of tokens, `BATCH`."""
    p = F.log_softmax(i.logits(), -1)
    return F.kl_div(p, F.softmax(i.teacher, -1), reduction="none").sum(-1)


def mask_made_late(i: Inputs) -> Tensor:
    losses = ce(i).view(BATCH)
    mask = (i.y != -100) & (i.weights > 0.3)
    return (losses * mask).sum() / mask.sum()


def mean_of_means(i: Inputs) -> Tensor:
    losses = ce(i).view(BATCH) * i.mask
    return (losses.sum(1) / i.mask.sum(1).clamp(min=1)).mean()


def shifted(i: Inputs) -> Tensor:
    losses = ce(i).view(BATCH)
    return (losses[:, :-1] * i.weights[:, 1:]).sum() / i.weights[:, 1:].sum()


def chosen(i: Inputs) -> Tensor:
    losses = ce(i).view(BATCH)
    losses = torch.where(i.mask > 0, losses, torch.zeros_like(losses))
    return losses.masked_fill(i.weights < 0.2, 0.0).mean()


def both_ways(i: Inputs) -> Tensor:
    losses = ce(i).view(BATCH)
    return (losses * i.mask - 0.5 * losses + losses / 3).t().sum(0, keepdim=True).sum()


def logged(i: Inputs) -> tuple[Tensor, Tensor]:
    losses = ce(i)
    loss = (losses * i.mask.view(-1)).sum() / i.mask.sum()
    return loss, losses.detach().square().max()


def mixed(i: Inputs) -> Tensor:
    """Two losses of each token, by one mask."""
    losses = 0.3 * ce(i).view(BATCH) + 0.7 * kl(i)
    return (losses * i.mask).sum() / i.mask.sum()


def beside(i: Inputs) -> Tensor:
    z = i.logits().view(-1, CLASSES)
    plain = F.cross_entropy(z, i.y.view(-1))
    p = F.log_softmax(z, -1)
    values = F.kl_div(p, F.softmax(flat(i.teacher), -1), reduction="none").sum(-1)
    return plain + 0.5 * (values * i.mask.view(-1)).mean()


FORMS: dict[str, Function] = {
    "sum": lambda i: ce(i).sum(),
    "times a mask": lambda i: (ce(i) * i.mask.view(-1)).sum() / i.mask.sum(),
    "mask first": lambda i: torch.sum(i.mask.view(-1).mul(ce(i))) / i.mask.sum(),
    "weights inside": lambda i: (ce(i) * (i.weights / i.weights.sum()).view(-1)).sum() * 2,
    "mask made late": mask_made_late,
    "mean of means": mean_of_means,
    "shifted": shifted,
    "chosen": chosen,
    "both ways": both_ways,
    "logged": logged,
    "inner product": lambda i: ce(i) @ i.weights.view(-1),
    "class weights and smoothing": lambda i: (
        ce(i, weight=i.b.detach().abs(), label_smoothing=0.1) * i.weights.view(-1)
    ).mean(),
    "scaled by what is trained": lambda i: (ce(i) * i.mask.view(-1)).sum() * i.temperature.exp(),
    "inside a larger loss": lambda i: (kl(i) * i.weights).sum().square() + i.temperature,
    "divergence": lambda i: (kl(i) * i.mask).sum() / i.mask.sum(),
    "picked": lambda i: kl(i)[i.mask > 0].mean(),
    "picked and weighed": lambda i: (ce(i).view(BATCH)[i.mask > 0] * 0.5).sum() / TOKENS,
    "picked by sequence": lambda i: kl(i)[i.mask.sum(1) > 3].mean(),
    "log-probabilities": lambda i: -(log_probs(i.logits(), i.known) * i.mask).sum() / i.mask.sum(),
    "logits less log-sum-exp": lambda i: (
        -(selected(i.logits(), i.known) * i.mask).sum() / i.mask.sum()
    ),
    "two losses of each token": mixed,
    "beside another loss": beside,
}
WEIGHTED = ["linear_cross_entropy_weighted.default", "linear_divergence_weighted.default"]


@pytest.fixture(autouse=True)
def picks_rows() -> Any:
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        yield


def operators(function: Function, inputs: Inputs) -> list[str]:
    """The operators of the one graph of a function after the passes."""
    names = [str(node.target) for node in rewritten(function, inputs).nodes]
    return sorted(name.removeprefix("memopt.") for name in names if name.startswith("memopt."))


@pytest.mark.parametrize("form", FORMS)
def test_gradients_are_made_in_the_forward_and_are_eagers(form: str) -> None:
    inputs = Inputs()
    record = assert_as_eager(FORMS[form], inputs, 3.0, chunk_rows=5)
    assert record.rewrites["weigh_rows"] >= 1, record.remarks
    assert set(operators(FORMS[form], inputs)) <= set(WEIGHTED)


def nonlinear(i: Inputs) -> Tensor:
    return -F.logsigmoid((log_probs(i.logits(), i.known) * i.mask).sum(-1)).mean()


def two_scalars(i: Inputs) -> Tensor:
    losses = ce(i)
    return (losses * i.mask.view(-1)).sum().sin() + losses.mean().cos()


def trained_weights(i: Inputs) -> Tensor:
    return (ce(i) * (i.weights * i.temperature).view(-1)).sum()


def focal(i: Inputs) -> Tensor:
    losses = ce(i)
    return ((1 - (-losses.detach()).exp()) ** 2 * losses).sum()


def read_early(i: Inputs) -> Tensor:
    losses = ce(i)
    top = losses.detach().max()
    mask = i.y.view(-1) != -100
    return (losses * mask).sum() / mask.sum() + 0 * top


def weights_overwritten(i: Inputs) -> Tensor:
    """Between the loss and their use."""
    weights = i.weights.view(-1) * 1.0
    losses = ce(i)
    weights.mul_(2.0)
    return (losses * weights).sum()


DECLINED: dict[str, tuple[Function, str]] = {
    "not linear": (nonlinear, "is not seen to be linear"),
    "two scalars": (two_scalars, "2 scalars depend on the values"),
    "weights that are trained": (trained_weights, "is not seen to be linear"),
    "weights of the values": (focal, "the weights depend on the values"),
    "values read before the weights": (read_early, "before the weights are known"),
    "weights overwritten": (weights_overwritten, "overwrites what"),
}


@pytest.mark.parametrize("form", DECLINED)
def test_where_weights_are_not_known_the_rows_stay_and_a_remark_says_why(form: str) -> None:
    plain, reason = DECLINED[form]
    record = assert_as_eager(plain, Inputs(), chunk_rows=5)
    assert record.rewrites["chunk_losses"] >= 1
    assert_declined(record, reason, "weigh_rows")


def test_without_gradients_rows_are_left_alone() -> None:
    inputs = Inputs()
    for tensor in (inputs.x, inputs.w, inputs.b):
        tensor.requires_grad_(False)
    assert operators(FORMS["times a mask"], inputs) == ["linear_cross_entropy_rows.default"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("form", ["times a mask", "picked", "mean of means", "mixed"])
def test_low_precision_is_as_near_to_float64_as_eager_is(form: str, dtype: torch.dtype) -> None:
    plain = mixed if form == "mixed" else FORMS[form]
    record = assert_near_float64(plain, lambda: Inputs(dtype), 20, chunk_rows=5)
    assert record.rewrites["weigh_rows"] >= 1


def test_two_runs_are_bitwise_equal() -> None:
    inputs = Inputs(torch.bfloat16)
    function, _ = compiled(mixed, chunk_rows=5)
    assert_same_bits(run(function, inputs), run(function, inputs))


@pytest.mark.parametrize("form", ["times a mask", "picked", "mask made late", "divergence"])
def test_with_every_row_masked_the_results_are_eagers(form: str) -> None:
    inputs = Inputs()
    inputs.mask.zero_()
    inputs.y.fill_(-100)
    expected = run(FORMS[form], inputs)
    function, records = compiled(FORMS[form], chunk_rows=5)
    actual = run(function, inputs)
    assert records[0].rewrites["weigh_rows"] == 1
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-10, atol=1e-12, equal_nan=True)


def test_a_masked_row_of_infinite_loss_makes_the_sum_what_it_makes_eagers() -> None:
    inputs = Inputs()
    inputs.mask[1, 1] = 0.0
    with torch.no_grad():
        inputs.x[1, 1] = 1e308
    for form in ("times a mask", "chosen"):
        expected, *_ = run(FORMS[form], inputs)
        function, _ = compiled(FORMS[form], chunk_rows=5)
        torch.testing.assert_close(run(function, inputs)[0], expected, equal_nan=True)


def test_weights_far_from_one_lose_nothing_in_float16() -> None:
    def plain(i: Inputs) -> Tensor:
        return (ce(i).float() * i.weights.view(-1).float() * 1e-9).sum()

    inputs = Inputs(torch.float16)
    exact = run(plain, converted(inputs, torch.float64), 1e9)
    function, _ = compiled(plain, chunk_rows=5)
    for a, e in zip(run(function, inputs, 1e9), exact, strict=True):
        torch.testing.assert_close(a.double(), e.double(), rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize(("form", "weighed"), [("two scalars", 0), ("means", 1), ("picked", 1)])
def test_lengths_change_without_a_recompilation(form: str, weighed: int) -> None:
    def function(x: Tensor, y: Tensor, mask: Tensor, i: Inputs) -> Tensor:
        z = F.linear(x, i.w)
        losses = F.cross_entropy(z.view(-1, CLASSES), y.view(-1), reduction="none").view_as(y)
        if form == "picked":
            return losses[mask > 0].mean()
        per_sequence = (losses[:, 1:] * mask[:, 1:]).mean(1)
        if form == "means":
            return per_sequence.sum()
        return per_sequence.mean() + (losses * mask).sum() / mask.sum()

    i = Inputs()
    own, records = compiled(function, dynamic=True)
    for length in (5, 3, 4):
        x, y, mask = (v[:, :length].contiguous().detach() for v in (i.x, i.y, i.mask))
        results = []
        for f in (own, function):
            hidden = x.clone().requires_grad_()
            loss = f(hidden, y, mask, i)
            results.append((loss, *torch.autograd.grad(loss, (hidden, i.w))))
        for a, e in zip(*results, strict=True):
            torch.testing.assert_close(a, e)
    (record,) = records
    assert record.rewrites["weigh_rows"] == weighed, record.remarks


def test_inductor_runs_what_the_pass_wrote() -> None:
    inputs = Inputs(torch.float32)
    expected = run(mixed, inputs)
    function = torch.compile(mixed, backend="memopt", options={"strict": True})
    for a, e in zip(run(function, inputs), expected, strict=True):
        torch.testing.assert_close(a, e)


def arguments(rows: int, classes: int, chunk_rows: int, dtype: torch.dtype) -> tuple[Any, ...]:
    x, w = torch.randn(rows, 16, dtype=dtype), torch.randn(classes, 16, dtype=dtype)
    y, g = torch.randint(0, classes, (rows,)), torch.rand(rows, dtype=torch.float64)
    g[::3] = 0
    wanted = [True, True, False]
    return x, w, None, y, None, -100, 0.0, 1.0, 0.0, chunk_rows, wanted, g.to(dtype), None


def test_torch_finds_the_operators_in_order() -> None:
    entropy = arguments(7, 300, 4, torch.float64)
    torch.library.opcheck(weighted_rows.CROSS_ENTROPY, entropy)
    x, w, g = entropy[0], entropy[1], entropy[-2]
    options = (None, -100, 0.5, False, [1.0, 1.0], [0.0, 0.0], 4, [True, True, False])
    torch.library.opcheck(weighted_rows.DIVERGENCE, (x, w, None, x, w, None, *options, g))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_it_allocates_is_what_the_formula_says(dtype: torch.dtype) -> None:
    args = arguments(128, 3000, 16, dtype)
    formula_bytes = linear_cross_entropy.scratch_bytes(*args)
    assert_scratch_is(formula_bytes, lambda: weighted_rows.CROSS_ENTROPY(*args))
