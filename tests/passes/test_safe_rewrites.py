"""Graphs in which a chunked loss, taken later than the logits, could be another number."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx

from memopt.backend import compile_graph, read_options
from memopt.record import GraphRecord

TOKENS, HIDDEN, CLASSES = 12, 8, 257
OPTIONS = {"lowering": "eager", "strict": True}

Function = Callable[..., Tensor]


class Inputs:
    """Hidden states, a head, a temperature and targets, in double precision."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.x = torch.randn(TOKENS, HIDDEN, dtype=torch.float64, requires_grad=True)
        self.w = torch.randn(CLASSES, HIDDEN, dtype=torch.float64, requires_grad=True)
        self.b = torch.randn(CLASSES, dtype=torch.float64, requires_grad=True)
        self.t = torch.tensor(1.7, dtype=torch.float64, requires_grad=True)
        self.y = torch.randint(0, CLASSES, (TOKENS,))

    def gradients(self, value: Tensor) -> list[Tensor | None]:
        trained = (self.x, self.w, self.b, self.t)
        return list(torch.autograd.grad(value, trained, allow_unused=True))


def compiled(function: Function) -> tuple[Function, list[GraphRecord]]:
    config, records = read_options(OPTIONS), list[GraphRecord]()

    def backend(gm: fx.GraphModule, inputs: Sequence[Any]) -> Any:
        return compile_graph(gm, inputs, config, records.append)

    return torch.compile(function, backend=backend), records


def remarks(records: list[GraphRecord]) -> str:
    return "; ".join(r.text for record in records for r in record.remarks)


@torch.library.custom_op("memopt_tests::add_one", mutates_args=("x",))
def add_one(x: Tensor) -> None:
    x.add_(1)


def power(h: Tensor) -> None:
    h **= 2


def remainder(h: Tensor) -> None:
    h %= 2


WRITES: dict[str, Callable[[Tensor], object]] = {
    "inplace by keyword": lambda h: F.relu(h, inplace=True),
    "inplace by position": lambda h: F.relu(h, True),
    "inplace of a module": torch.nn.Dropout(1.0, inplace=True),
    "out": lambda h: torch.add(h, 1.0, out=h),
    "power": power,
    "remainder": remainder,
    "an operator of aten": lambda h: torch.ops.aten.mul_.Tensor(h, h * 2),
    "a custom operator": add_one,
}


@pytest.mark.parametrize("write", WRITES)
def test_a_hidden_state_that_is_overwritten_in_any_way_keeps_its_logits(write: str) -> None:
    def loss(i: Inputs) -> Tensor:
        hidden = (i.x * 1.0).detach()
        logits = F.linear(hidden, i.w.detach(), i.b)
        WRITES[write](hidden)
        return F.cross_entropy(logits, i.y) + hidden.sum()

    inputs = Inputs()
    run, records = compiled(loss)
    torch.testing.assert_close(run(inputs), loss(inputs), rtol=1e-12, atol=1e-12)
    assert "overwrites an input of the head" in remarks(records)


def bias_overwritten(i: Inputs) -> Tensor:
    buffer = i.b.detach().clone()
    logits = F.linear(i.x, i.w) + buffer
    buffer.mul_(3.0)
    return F.cross_entropy(logits, i.y) + buffer.sum()


def factor_overwritten(i: Inputs) -> Tensor:
    factor = i.t.detach().clone()
    logits = F.linear(i.x, i.w).detach() * factor
    factor.mul_(3.0)
    return F.cross_entropy(logits, i.y) + i.t


def teachers_bias_overwritten(i: Inputs) -> Tensor:
    buffer = i.b.detach().clone()
    teacher = F.linear(i.x.detach() + 1, i.w.detach()) + buffer
    buffer.mul_(3.0)
    student = F.log_softmax(F.linear(i.x, i.w), -1)
    return F.kl_div(student, F.softmax(teacher, -1), reduction="batchmean") + buffer.sum()


@pytest.mark.parametrize("loss", [bias_overwritten, factor_overwritten, teachers_bias_overwritten])
def test_a_bias_or_factor_that_is_overwritten_keeps_the_logits(loss: Function) -> None:
    inputs = Inputs()
    run, records = compiled(loss)
    expected, actual = loss(inputs), run(inputs)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(inputs.gradients(actual), inputs.gradients(expected))
    assert "overwrites a factor or bias of the logits" in remarks(records)


def test_a_factor_in_place_is_no_write_to_the_factor() -> None:
    inputs = Inputs()
    run, records = compiled(lambda i: F.cross_entropy(F.linear(i.x, i.w).mul_(i.t), i.y))
    run(inputs)
    assert records[0].rewrites["chunk_losses"] == 1


@torch.no_grad()
def without_gradient(i: Inputs) -> Tensor:
    return F.linear(i.x, i.w)


@torch.no_grad()
def view_without_gradient(z: Tensor) -> Tensor:
    return z.view(-1, CLASSES)


def distilled(i: Inputs, logits: Tensor) -> Tensor:
    teacher = F.softmax(F.linear(i.x.detach() + 1, i.w.detach()), -1)
    return F.kl_div(F.log_softmax(logits, -1), teacher, reduction="batchmean")


STOPPED: dict[str, Function] = {
    "head, then a trained bias": lambda i: F.cross_entropy(without_gradient(i) + i.b, i.y),
    "head, then a trained factor": lambda i: F.cross_entropy(without_gradient(i) * i.t, i.y),
    "a view, then a trained bias": lambda i: F.cross_entropy(
        view_without_gradient(F.linear(i.x, i.w)) + i.b, i.y
    ),
    "log-probabilities": lambda i: (
        (without_gradient(i) * i.t).log_softmax(-1).gather(-1, i.y[:, None]).sum()
    ),
    "divergence": lambda i: distilled(i, without_gradient(i) * i.t),
    "divergence, detached": lambda i: distilled(i, F.linear(i.x, i.w).detach() * i.t),
}


@pytest.mark.parametrize("form", STOPPED)
def test_no_gradient_flows_past_where_it_stops(form: str) -> None:
    inputs, loss = Inputs(), STOPPED[form]
    run, _ = compiled(loss)
    wanted, got = inputs.gradients(loss(inputs)), inputs.gradients(run(inputs))
    assert [g is None for g in got] == [g is None for g in wanted]
    assert wanted[0] is None
    for mine, plain in zip(got, wanted, strict=True):
        if mine is not None:
            torch.testing.assert_close(mine, plain, rtol=1e-10, atol=1e-12)


def smoothed(x: Tensor, w: Tensor, y: Tensor, number: float) -> Tensor:
    return F.cross_entropy(F.linear(x, w), y, label_smoothing=number)


def last_rows(x: Tensor, w: Tensor, y: Tensor, number: int) -> Tensor:
    return F.cross_entropy(F.linear(x, w)[-number:], y[-number:])


def both_ways(x: Tensor, w: Tensor, y: Tensor, number: int) -> Tensor:
    z, classes = w @ (w + 1).T, torch.arange(len(w))
    rows = F.cross_entropy(z, classes, ignore_index=number)
    return rows + F.cross_entropy(z.T, classes, ignore_index=number)


@pytest.mark.parametrize(
    ("loss", "numbers"),
    [(smoothed, [0.1, 0.2, 0.3]), (last_rows, [3, 4, 5]), (both_ways, [-100, -99, 4])],
)
def test_a_number_that_changes_from_call_to_call_becomes_symbolic(
    loss: Function, numbers: list[float]
) -> None:
    i = Inputs()
    run, _ = compiled(loss)
    for number in numbers:
        expected, actual = (f(i.x, i.w, i.y, number) for f in (loss, run))
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


def test_a_class_picked_before_an_ellipsis_is_no_slice_of_rows() -> None:
    """With as many tokens as classes the shape does not tell."""
    x = torch.randn(CLASSES, HIDDEN, dtype=torch.float64)
    w = torch.randn(CLASSES, HIDDEN, dtype=torch.float64)

    def loss(x: Tensor, w: Tensor) -> Tensor:
        return torch.logsumexp(F.linear(x, w)[:, 3, ...], -1)

    run, _ = compiled(loss)
    torch.testing.assert_close(run(x, w), loss(x, w))


def test_a_loss_that_alone_is_inside_a_transform_is_left_to_it() -> None:
    i = Inputs()
    x, w = i.x.detach(), i.w.detach()

    def slope(x: Tensor, w: Tensor, t: Tensor) -> Tensor:
        logits = F.linear(x, w)
        slope: Tensor = torch.func.grad(lambda t: F.cross_entropy(logits * t, i.y))(t)
        return slope

    run, records = compiled(slope)
    t = torch.ones((), dtype=torch.float64)
    torch.testing.assert_close(run(x, w, t), slope(x, w, t))
    assert "inside a functorch transform" in remarks(records)


def test_inference_mode_inside_the_graph_is_served() -> None:
    @torch.inference_mode()
    def loss(i: Inputs) -> Tensor:
        return F.cross_entropy(F.linear(i.x, i.w), i.y)

    inputs = Inputs()
    run, records = compiled(loss)
    actual = run(inputs)
    assert records[0].rewrites["chunk_losses"] == 1
    torch.testing.assert_close(actual.item(), loss(inputs).item(), rtol=1e-12, atol=1e-12)


def normalised(z: Tensor, mean: Tensor) -> Tensor:
    return F.batch_norm(z, mean, torch.ones_like(mean), None, None, True)


def normalised_by_name(z: Tensor, mean: Tensor) -> Tensor:
    return F.batch_norm(z, running_var=torch.ones_like(mean), running_mean=mean, training=True)


def normalised_by_row(z: Tensor, mean: Tensor) -> Tensor:
    return F.instance_norm(z.view(1, CLASSES, -1), mean, torch.ones_like(mean))


@pytest.mark.parametrize("norm", [normalised, normalised_by_name, normalised_by_row])
def test_running_statistics_are_written_while_training(norm: Function) -> None:
    i = Inputs()
    bias = i.b.detach()

    def loss(i: Inputs, mean: Tensor) -> Tensor:
        z = F.linear(i.x, i.w, mean)
        other = norm(torch.ones(TOKENS, CLASSES, dtype=torch.float64) * i.t.detach(), mean)
        return F.cross_entropy(z, i.y) + other.sum()

    run, records = compiled(loss)
    torch.testing.assert_close(run(i, bias.clone()), loss(i, bias.clone()))
    assert "overwrites an input of the head" in remarks(records)


def test_running_statistics_are_read_and_no_more_in_evaluation() -> None:
    i = Inputs()
    variance = torch.ones(CLASSES, dtype=torch.float64)

    def loss(i: Inputs, mean: Tensor) -> Tensor:
        z = F.linear(i.x, i.w, mean)
        other = F.batch_norm(torch.ones_like(i.w).T, mean, variance)
        return F.cross_entropy(z, i.y) + other.sum()

    run, records = compiled(loss)
    torch.testing.assert_close(run(i, i.b.detach()), loss(i, i.b.detach()))
    assert records[0].rewrites["chunk_losses"] == 1
