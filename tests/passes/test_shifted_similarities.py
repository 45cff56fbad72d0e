"""One number added to all similarities, as open_clip's ``logit_bias``: no softmax sees it."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from memopt.remarks import RemarkKind
from tests.passes.compiling import assert_as_eager, assert_near_float64
from tests.passes.pairs import PAIRS, Function, Inputs, autocast, both


def open_clip(i: Inputs) -> Tensor:
    """As ``ClipLoss.get_logits`` writes it."""
    x = i.scale * i.x @ i.y.T
    y = i.scale * i.y @ i.x.T
    x += i.bias
    y += i.bias
    return both(x, y)


def transposed(i: Inputs) -> Tensor:
    return both(i.scale * (i.x @ i.y.T) + i.bias)


FORMS: dict[str, Function] = {
    "in place": open_clip,
    "out of place": lambda i: both(i.scale * i.x @ i.y.T + i.bias, i.scale * i.y @ i.x.T + i.bias),
    "transposed": transposed,
    "before the scale": lambda i: both((i.x @ i.y.T + i.bias) * i.scale),
    "bias first": lambda i: both(i.bias + i.scale * (i.x @ i.y.T)),
    "one dimension": lambda i: both(i.scale * (i.x @ i.y.T) + i.bias.view(1)),
    "frozen": lambda i: both(i.scale * (i.x @ i.y.T) + i.bias.detach()) + 0 * i.bias,
    "in one direction": lambda i: both(i.scale * i.x @ i.y.T + i.bias, i.scale * i.y @ i.x.T),
}


@pytest.mark.parametrize("form", FORMS)
def test_a_bias_is_left_out_and_has_eagers_gradient(form: str) -> None:
    record = assert_as_eager(FORMS[form], Inputs())
    remarks = [r for r in record.remarks if r.pass_name == "chunk_losses"]
    assert {r.kind for r in remarks} == {RemarkKind.APPLIED}, remarks
    assert record.rewrites["chunk_losses"] == 1


def test_a_loss_in_one_direction_takes_the_bias_as_one_per_class() -> None:
    def function(i: Inputs) -> Tensor:
        z = i.scale * i.x @ i.y.T + i.bias
        loss = F.cross_entropy(z, torch.arange(PAIRS))
        return loss + torch.logsumexp(z, -1).square().mean()

    assert assert_as_eager(function, Inputs()).rewrites["chunk_losses"] == 1


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "autocast"])
def test_low_precision_is_as_near_to_float64_as_eager_is(dtype: str) -> None:
    seeds = iter(range(5))
    own = transposed if dtype != "autocast" else autocast(transposed)

    def draw() -> Inputs:
        torch.manual_seed(next(seeds))
        return Inputs(torch.bfloat16 if dtype == "bfloat16" else torch.float32)

    record = assert_near_float64(own, draw, exact=transposed)
    assert record.rewrites["chunk_losses"] == 1


def read_beside(i: Inputs) -> Tensor:
    z = i.x @ i.y.T
    mean = z.view(-1)
    z += i.bias
    return both(z) + mean.mean()


def one_bias_per_column(i: Inputs) -> Tensor:
    return both(i.x @ i.y.T + i.x[:, 0])


@pytest.mark.parametrize("function", [read_beside, one_bias_per_column])
def test_what_is_more_than_a_shift_stays(function: Function) -> None:
    record = assert_as_eager(function, Inputs())
    assert not any("both directions" in r.text for r in record.remarks)
    missed = [r for r in record.remarks if r.kind is RemarkKind.MISSED]
    assert [bool(r.source) for r in missed] == [True], missed


def test_similarities_that_are_returned_with_a_bias_stay_whole_and_a_remark_says_so() -> None:
    def function(i: Inputs) -> tuple[Tensor, Tensor]:
        z = i.scale * (i.x @ i.y.T) + i.bias
        return both(z), z

    record = assert_as_eager(function, Inputs())
    assert any("returns similarities with something added" in r.text for r in record.remarks)
