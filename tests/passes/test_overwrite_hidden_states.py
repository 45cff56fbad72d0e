"""Hidden states that nothing reads any more make room for their gradient, in either lowering."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import memopt
from bench.meter import Meter
from memopt._torch import functorch_config, inductor_config

HIDDEN, CLASSES, BATCH, TOKENS = 64, 1000, 4, 512
NAME = "overwrite_hidden_states"
LOWERINGS = ["eager", "inductor"]
DTYPES = [torch.float32, torch.bfloat16]


class Head(nn.Linear):
    """A head with hidden states of its own, and the weight of a norm."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__(HIDDEN, CLASSES, bias=False, dtype=dtype)
        self.state = nn.Parameter(torch.randn(BATCH, TOKENS, HIDDEN, dtype=dtype))
        self.norm = nn.Parameter(torch.rand(HIDDEN, dtype=dtype))


Ending = Callable[[Head, Tensor, Tensor], Any]


def loss_of(head: Head, hidden: Tensor, labels: Tensor) -> Tensor:
    logits = head(hidden.reshape(-1, HIDDEN)).float()
    return F.cross_entropy(logits, labels.reshape(-1))


class Model(nn.Module):
    """One layer, arithmetic that makes the hidden states, and an ending that reads them."""

    def __init__(self, ending: Ending, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.layer = nn.Linear(HIDDEN, HIDDEN, dtype=dtype)
        self.head = Head(dtype)
        self.ending = ending

    def forward(self, x: Tensor, labels: Tensor) -> Any:
        return self.ending(self.head, torch.tanh(self.layer(x)) * 2.0, labels)


def made(ending: Ending = loss_of, dtype: torch.dtype = torch.float32) -> tuple[Model, Any]:
    torch.manual_seed(0)
    labels = torch.randint(0, CLASSES, (BATCH, TOKENS))
    labels[0, :9] = -100
    x = torch.randn(BATCH, TOKENS, HIDDEN, dtype=dtype, requires_grad=True)
    return Model(ending, dtype), (x, labels)


def options(lowering: str, *, on: bool = True) -> dict[str, Any]:
    return {"lowering": lowering, "strict": True, "passes": {NAME: on}}


def gradients(run: Any, model: nn.Module, inputs: Any) -> list[Tensor]:
    model.zero_grad(set_to_none=True)
    inputs[0].grad = None
    result = run(*inputs)
    (result if isinstance(result, Tensor) else result[0]).backward()
    found = [inputs[0].grad, *(p.grad for p in model.parameters())]
    return [g.clone() for g in found if g is not None]


@pytest.mark.parametrize("lowering", LOWERINGS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_are_the_same_to_the_bit_and_the_peak_is_lower_by_one_tensor(
    lowering: str, dtype: torch.dtype
) -> None:
    peaks, results = [], []
    for on in (True, False):
        torch._dynamo.reset()
        model, inputs = made(dtype=dtype)
        run = torch.compile(model, backend="memopt", options=options(lowering, on=on))
        gradients(run, model, inputs)
        results.append(gradients(run, model, inputs))
        model.zero_grad(set_to_none=True)
        inputs[0].grad = None
        with Meter("cpu") as meter:
            run(*inputs).backward()
        peaks.append(meter.peak_bytes)
        (graph,) = memopt.explain(model, *inputs, options=options(lowering, on=on)).graphs
        assert graph.rewrites.get(NAME, 0) == int(on)
        slack = 2**14  # ignored rows are left out: the formula is for rows that all count
        assert meter.peak_bytes - 64 <= graph.predicted_peak_bytes <= meter.peak_bytes + slack
    for mine, plain in zip(*results, strict=True):
        assert torch.equal(mine, plain)
    assert peaks[1] - peaks[0] == BATCH * TOKENS * HIDDEN * dtype.itemsize


def also_returned(head: Head, hidden: Tensor, labels: Tensor) -> Any:
    return loss_of(head, hidden, labels), hidden


def a_view_returned(head: Head, hidden: Tensor, labels: Tensor) -> Any:
    return loss_of(head, hidden, labels), hidden[:, 0].detach()


def read_later(head: Head, hidden: Tensor, labels: Tensor) -> Any:
    return loss_of(head, hidden, labels) + hidden.float().square().mean()


def saved(head: Head, hidden: Tensor, labels: Tensor) -> Any:
    return loss_of(head, hidden, labels), (hidden @ hidden.mT).sum()


def a_part(head: Head, hidden: Tensor, labels: Tensor) -> Any:
    return loss_of(head, hidden.view(-1, HIDDEN)[TOKENS:], labels[1:])


def an_input(head: Head, hidden: Tensor, labels: Tensor) -> Any:
    return loss_of(head, head.state, labels) + hidden.sum() * 0


def a_copy_of_an_input(head: Head, hidden: Tensor, labels: Tensor) -> Any:
    return loss_of(head, head.state.clone(), labels) + hidden.sum() * 0


@pytest.mark.parametrize("lowering", LOWERINGS)
@pytest.mark.parametrize(
    "ending",
    [also_returned, a_view_returned, read_later, saved, a_part, an_input, a_copy_of_an_input],
)
def test_what_is_read_elsewhere_or_not_its_own_stays(lowering: str, ending: Ending) -> None:
    model, inputs = made(ending)
    before = model.head.state.detach().clone()
    plain = torch.compile(model, backend="memopt", options=options(lowering, on=False))
    expected = gradients(plain, model, inputs)
    torch._dynamo.reset()
    run = torch.compile(model, backend="memopt", options=options(lowering))
    for mine, other in zip(gradients(run, model, inputs), expected, strict=True):
        assert torch.equal(mine, other)
    assert torch.equal(model.head.state, before)
    (graph,) = memopt.explain(model, *inputs, options=options(lowering)).graphs
    assert graph.rewrites["chunk_losses"] >= 1
    assert graph.rewrites[NAME] == 0
    assert any(r.pass_name == NAME and "hidden states" in r.text for r in graph.remarks)


def test_float16_keeps_its_hidden_states() -> None:
    model, inputs = made(dtype=torch.float16)
    (graph,) = memopt.explain(model, *inputs, options=options("eager")).graphs
    assert graph.rewrites[NAME] == 0


@pytest.mark.parametrize("lowering", LOWERINGS)
def test_normalised_hidden_states_and_other_lengths(lowering: str) -> None:
    """As models end: behind a norm; one compilation serves lengths that it has not seen."""

    def normalised(head: Head, hidden: Tensor, labels: Tensor) -> Tensor:
        return loss_of(head, F.layer_norm(hidden, (HIDDEN,), head.norm), labels)

    model, (x, labels) = made(normalised)
    (graph,) = memopt.explain(model, x, labels, options=options(lowering)).graphs
    assert graph.rewrites[NAME] == 1
    for length in (TOKENS, 300, 77):
        short = (x.detach()[:, :length].clone().requires_grad_(), labels[:, :length])
        torch._dynamo.mark_dynamic(short[0], 1)
        torch._dynamo.mark_dynamic(short[1], 1)
        run = torch.compile(model, backend="memopt", options=options(lowering))
        actual = gradients(run, model, short)
        for mine, plain in zip(actual, gradients(model, model, short), strict=True):
            torch.testing.assert_close(mine, plain, rtol=1e-4, atol=1e-6)


def test_hidden_states_that_are_converted_under_sizes_that_vary() -> None:
    def converted(head: Head, hidden: Tensor, labels: Tensor) -> Tensor:
        wide = hidden.reshape(-1, HIDDEN).double()
        logits = F.linear(wide, head.weight.double())
        return F.cross_entropy(logits, labels.reshape(-1))

    model, inputs = made(converted)
    for tensor in inputs:
        torch._dynamo.mark_dynamic(tensor, 1)
    run = torch.compile(model, backend="memopt", options=options("eager"))
    for mine, plain in zip(
        gradients(run, model, inputs), gradients(model, model, inputs), strict=True
    ):
        torch.testing.assert_close(mine, plain)


@pytest.mark.parametrize("lowering", LOWERINGS)
def test_a_backward_may_run_twice_and_not_be_differentiated(lowering: str) -> None:
    model, inputs = made()
    fresh = inductor_config.patch(force_disable_caches=True)  # its key lacks the next option
    with fresh, functorch_config.patch(donated_buffer=False):
        run = torch.compile(model, backend="memopt", options=options(lowering))
        loss = run(*inputs)
        leaves = [model.layer.weight, model.head.weight]
        first = torch.autograd.grad(loss, leaves, retain_graph=True)
        second = torch.autograd.grad(loss, leaves, retain_graph=True)
        for one, two in zip(first, second, strict=True):
            assert torch.equal(one, two)
        (again,) = torch.autograd.grad(loss, inputs[0], create_graph=True)
        with pytest.raises(RuntimeError, match="double backward"):
            again.sum().backward()
