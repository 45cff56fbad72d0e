"""A tied weight in low precision: the embedding's rows go straight onto the head's gradient."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import memopt
from bench.meter import Meter
from memopt.kernels.embedding_gradient import EMBEDDING_ROWS, rows_scratch_bytes

ROWS, WIDTH, TOKENS = 20000, 128, 64
DTYPES = [torch.bfloat16, torch.float16]


class Model(nn.Module):
    """An embedding and a head with one weight."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.embedding = nn.Embedding(ROWS, WIDTH, padding_idx=3, dtype=dtype)

    def forward(self, ids: Tensor, factor: float = 1.0) -> Tensor:
        hidden = self.embedding(ids).tanh()
        logits = F.linear(hidden, self.embedding.weight).float()
        return F.cross_entropy(logits, (ids + 1) % ROWS) * factor


def made(dtype: torch.dtype) -> tuple[Model, Tensor]:
    """Few classes, so that most tokens share a row with others; and a row of padding."""
    return Model(dtype), torch.randint(0, 12, (TOKENS,))


def gradient(run: Any, model: Model, ids: Tensor, factor: float) -> Tensor:
    model.zero_grad(set_to_none=True)
    run(ids, factor).backward()
    assert model.embedding.weight.grad is not None
    return model.embedding.weight.grad.clone()


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_gradient_is_as_near_to_the_exact_one_as_eagers_and_repeats(
    dtype: torch.dtype,
) -> None:
    model, ids = made(dtype)
    factor = 64.0  # float16 would lose small gradients, in eager too
    exact = Model(torch.float64)
    exact.load_state_dict(model.state_dict())
    truth = gradient(exact, exact, ids, factor)
    eager = gradient(model, model, ids, factor)
    (graph,) = memopt.explain(model, ids, factor, options={"strict": True}).graphs
    assert any("in float32" in r.text for r in graph.remarks)
    run = torch.compile(model, backend="memopt", options={"strict": True})
    first, second = (gradient(run, model, ids, factor) for _ in range(2))
    assert torch.equal(first, second)
    assert (first.double() - truth).norm() <= (eager.double() - truth).norm()
    shared = torch.unique(ids)
    assert (first.double() - truth)[shared].norm() <= (eager.double() - truth)[shared].norm()


def test_the_backward_holds_one_gradient_of_the_weight() -> None:
    model, ids = made(torch.bfloat16)
    peaks = []
    for on in (True, False):
        torch._dynamo.reset()
        passes: dict[str, Any] = {"embedding_gradients": on, "chunk_losses": {"chunk_rows": 8}}
        options: dict[str, Any] = {"passes": passes}
        run = torch.compile(model, backend="memopt", options=options)
        gradient(run, model, ids, 1.0)
        model.zero_grad(set_to_none=True)
        loss = run(ids, 1.0)
        with Meter("cpu") as meter:
            loss.backward()
        peaks.append(meter.peak_bytes)
    weight = model.embedding.weight.nbytes
    assert peaks[0] < weight // 4 < weight <= peaks[1]  # besides the head's, made in the forward


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_plan_counts_one_gradient_of_the_weight_as_the_certificate_does(
    dtype: torch.dtype,
) -> None:
    model, ids = made(dtype)
    options = {"passes": {"chunk_losses": {"chunk_rows": 8}}}
    (graph,) = memopt.explain(model, ids, options=options).graphs
    weight = model.embedding.weight.nbytes
    assert graph.predicted_peak_bytes < 1.25 * weight
    assert graph.baseline_peak_bytes < 1.25 * weight


def test_rows_are_added_up_and_rounded_once() -> None:
    index = torch.tensor([[1, 1, 4], [4, 1, 0]])
    counted = torch.tensor([[True, True, True], [True, True, False]])
    values, rows = torch.randn(2, 3, 8).bfloat16(), torch.randn(5, 8).bfloat16()
    expected = rows.float()
    expected[1] += values[0, 0].float() + values[0, 1].float() + values[1, 1].float()
    expected[4] += values[0, 2].float() + values[1, 0].float()
    actual = EMBEDDING_ROWS(rows[index], index, counted, values)
    torch.testing.assert_close(actual.float(), expected[index], rtol=2**-8, atol=0)
    assert torch.equal(actual[0, 0], actual[0, 1])
    assert torch.equal(actual[1, 2], rows[0])


def test_scratch_is_bounded_by_the_tokens() -> None:
    index = torch.randint(0, ROWS, (300,))
    values = torch.randn(300, WIDTH).bfloat16()
    args = (values.clone(), index, torch.ones(300, dtype=torch.bool), values)
    EMBEDDING_ROWS(*args)
    with Meter("cpu") as meter:
        result = EMBEDDING_ROWS(*args)
    measured = meter.peak_bytes - meter.end_bytes
    assert measured <= rows_scratch_bytes(*args) <= 1.5 * measured
    del result


def test_the_operator_keeps_torchs_contracts() -> None:
    rows = torch.randn(2, 4).bfloat16()
    args = (rows, torch.tensor([0, 2]), torch.tensor([True, False]), torch.randn(2, 4).bfloat16())
    torch.library.opcheck(EMBEDDING_ROWS, args)
