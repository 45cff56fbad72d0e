"""Logits that a graph returns beside their loss: lazy, kept, dropped or whole."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import memopt
from memopt.lazy.logits import LazyLogits
from tests.passes.compiling import assert_close, options, run_compiled
from tests.passes.one_head import CLASSES, HIDDEN, Inputs, flat, shifted


class Model(nn.Module):
    """A head whose logits are returned, as language models do."""

    def __init__(self, *, bias: bool = False) -> None:
        super().__init__()
        self.body = nn.Linear(HIDDEN, HIDDEN, dtype=torch.float64)
        self.head = nn.Linear(HIDDEN, CLASSES, bias=bias, dtype=torch.float64)

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.head(self.body(x)) * 0.5
        return shifted(logits, y), logits


@pytest.fixture
def model() -> Model:
    torch.manual_seed(0)
    return Model(bias=True)


def parameter_gradients(model: Model, loss: Tensor) -> list[Tensor | None]:
    model.zero_grad()
    torch.autograd.backward(loss)
    return [None if p.grad is None else p.grad.clone() for p in model.parameters()]


def test_returned_logits_are_lazy_and_have_eagers_values_and_gradients(model: Model) -> None:
    i = Inputs()
    loss, logits = model(i.x, i.y)
    expected = parameter_gradients(model, loss + logits.square().mean())
    compiled = torch.compile(model, backend="memopt", options=options())
    loss, lazy = compiled(i.x, i.y)
    assert isinstance(lazy, LazyLogits)
    assert lazy.shape == logits.shape
    assert torch.equal(lazy.detach(), logits)
    assert_close(parameter_gradients(model, loss + lazy.square().mean()), expected)


def test_returned_logits_can_be_dropped_kept_or_left_whole(model: Model) -> None:
    i = Inputs()
    loss, logits = model(i.x, i.y)
    expected = parameter_gradients(model, loss)
    for mode in ("none", "keep", "full"):
        torch._dynamo.reset()
        compiled = torch.compile(model, backend="memopt", options=options(logits=mode))
        loss, returned = compiled(i.x, i.y)
        assert_close(parameter_gradients(model, loss), expected)
        assert type(returned) is (type(None) if mode == "none" else Tensor)
        if returned is not None:
            torch.testing.assert_close(returned, logits)
            assert returned.requires_grad == (mode == "full")


def test_logits_that_are_read_behind_a_graph_break_are_lazy_and_not_none() -> None:
    def function(i: Inputs) -> tuple[Tensor, Tensor]:
        logits = F.linear(i.x, i.w)
        loss = F.cross_entropy(flat(logits), i.y.view(-1))
        torch._dynamo.graph_break()
        return loss, logits.argmax(-1)

    inputs = Inputs()
    expected = function(inputs)
    actual, (record, *_) = run_compiled(function, inputs, logits="none")
    assert record.rewrites["chunk_losses"] == 1
    assert any("returned logits: lazy" in remark.text for remark in record.remarks)
    torch.testing.assert_close(actual, expected)


def test_an_optimiser_step_makes_lazy_logits_stale(model: Model) -> None:
    i = Inputs()
    compiled = torch.compile(model, backend="memopt", options=options())
    loss, lazy = compiled(i.x, i.y)
    loss.backward()
    torch.optim.SGD(model.parameters(), 0.1).step()
    with pytest.raises(memopt.errors.StaleLogitsError, match=r"optimizer\.step"):
        lazy.argmax(-1)


def test_logits_made_without_gradients_are_returned_without() -> None:
    def function(i: Inputs) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            logits = F.linear(i.x, i.w)
        return F.cross_entropy(flat(logits), i.y.view(-1)), logits

    inputs = Inputs()
    (loss, logits), (record,) = run_compiled(function, inputs)
    assert record.rewrites["chunk_losses"] == 1
    assert not loss.requires_grad
    assert not logits.requires_grad
    assert torch.equal(logits, function(inputs)[1])
