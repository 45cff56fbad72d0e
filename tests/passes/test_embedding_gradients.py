"""Gradients of embeddings: no float32 copy of the weight's size, and none beside a tied head's."""

from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import memopt
from bench.meter import Meter
from memopt.kernels.embedding_gradient import EMBEDDING_GRADIENT, scratch_bytes
from tests.scratch import scratch_of

ROWS, WIDTH, TOKENS = 5000, 128, 8


class Model(nn.Module):
    """An embedding, and a head that may share its weight."""

    def __init__(self, *, tied: bool, dtype: torch.dtype) -> None:
        super().__init__()
        self.embedding = nn.Embedding(ROWS, WIDTH, padding_idx=3, dtype=dtype)
        nn.init.normal_(self.embedding.weight, std=WIDTH**-0.5)  # so that losses are not nearly 0
        self.head = nn.Linear(WIDTH, ROWS, bias=False, dtype=dtype)
        if tied:
            self.head.weight = self.embedding.weight

    def forward(self, ids: Tensor) -> Tensor:
        hidden = self.embedding(ids).tanh()
        return F.cross_entropy(self.head(hidden).float(), ids)


def gradient(run: Any, model: Model, ids: Tensor) -> Tensor:
    model.zero_grad(set_to_none=True)
    run(ids).backward()
    assert model.embedding.weight.grad is not None
    return model.embedding.weight.grad.clone()


def made(*, tied: bool, dtype: torch.dtype) -> tuple[Model, Tensor]:
    torch.manual_seed(0)
    return Model(tied=tied, dtype=dtype), torch.randint(0, 6, (TOKENS,))


@pytest.mark.parametrize(("tied", "dtype"), [(False, torch.bfloat16), (True, torch.float32)])
def test_the_gradient_is_eagers_and_the_rewrite_is_remarked(
    tied: bool, dtype: torch.dtype
) -> None:
    model, ids = made(tied=tied, dtype=dtype)
    exact, _ = made(tied=tied, dtype=torch.float64)
    exact.load_state_dict(model.state_dict())
    truth = gradient(exact, exact, ids)
    eager = gradient(model, model, ids)
    (graph,) = memopt.explain(model, ids, options={"strict": True}).graphs
    assert graph.rewrites["embedding_gradients"] == 1
    actual = gradient(torch.compile(model, backend="memopt"), model, ids)
    floor = torch.finfo(dtype).eps * float(truth.abs().max())
    assert (actual - truth).abs().max() <= (eager - truth).abs().max() + floor
    if not tied:  # the row of padding has no gradient
        assert not actual[3].any()


def test_the_step_holds_no_second_tensor_of_the_weights_size() -> None:
    model, ids = made(tied=False, dtype=torch.bfloat16)
    compiled = torch.compile(model, backend="memopt")
    gradient(compiled, model, ids)
    model.zero_grad(set_to_none=True)
    with Meter("cpu") as meter:
        compiled(ids).backward()
    weight_bytes = ROWS * WIDTH * 2
    assert meter.peak_bytes < 2 * weight_bytes + weight_bytes // 2  # both gradients, little more


def test_rows_are_added_up_in_float32_and_negative_indices_count_from_the_end() -> None:
    index = torch.tensor([[1, 1, -1], [4, 1, 0]])
    counted = torch.tensor([[True, True, True], [True, True, False]])
    values = torch.randn(2, 3, 8).bfloat16()
    expected = torch.zeros(5, 8)
    expected[1] = values[0, 0].float() + values[0, 1].float() + values[1, 1].float()
    expected[4] = values[0, 2].float() + values[1, 0].float()
    actual = EMBEDDING_GRADIENT(index, counted, values, 5)
    assert torch.equal(actual, expected.bfloat16())


def test_scratch_is_bounded_by_the_tokens() -> None:
    index = torch.randint(0, ROWS, (300,))
    args = (index, torch.ones(300, dtype=torch.bool), torch.randn(300, WIDTH).bfloat16(), ROWS)
    measured = scratch_of(partial(EMBEDDING_GRADIENT, *args))
    assert measured <= scratch_bytes(*args) <= 1.5 * measured


def test_the_operator_keeps_torchs_contracts() -> None:
    args = (torch.tensor([0, 2]), torch.tensor([True, False]), torch.randn(2, 4).bfloat16(), 3)
    torch.library.opcheck(EMBEDDING_GRADIENT, args)
