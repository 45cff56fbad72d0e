"""Losses by rows that are weighed, scaled and shifted in place: gradients in the forward too."""

from typing import Any

import pytest
import torch.nn.functional as F
from torch import Tensor

from tests.passes.compiling import assert_as_eager
from tests.passes.one_head import Function, Inputs, flat


def losses(i: Inputs) -> Tensor:
    return F.cross_entropy(flat(F.linear(i.x, i.w, i.b)), i.y.view(-1), reduction="none")


def masked(i: Inputs) -> Tensor:
    loss = losses(i)
    loss *= i.mask.view(-1)
    return loss.sum() / i.mask.sum()


def several(i: Inputs) -> Tensor:
    loss = F.cross_entropy(F.linear(i.x, i.w).transpose(1, 2), i.y, reduction="none")
    loss /= 3.0
    loss *= i.mask
    loss += 1.0
    loss -= i.mask
    return loss.mean()


def methods(i: Inputs) -> Tensor:
    loss = losses(i).neg_().mul_(i.mask.flatten()).div_(i.count)
    return loss.add_(0.5).sub_(i.mask.flatten()).masked_fill_(i.y.flatten() == -100, 0.0).sum()


def through_a_view(i: Inputs) -> Tensor:
    loss = losses(i).view(i.y.shape)
    loss *= i.mask
    return loss.sum(-1).mean()


def summed(i: Inputs) -> Any:
    total: Any = 0.0
    total += (losses(i) * i.mask.view(-1)).sum()
    return total * 0.5


FOUND: dict[str, Function] = {
    "masked": masked,
    "several": several,
    "methods": methods,
    "through a view": through_a_view,
    "into a number": summed,
}


@pytest.mark.parametrize("form", FOUND)
def test_weights_in_place_are_known_before_the_loss(form: str) -> None:
    record = assert_as_eager(FOUND[form], Inputs())
    assert record.rewrites["weigh_rows"] == 1, record.remarks


def read_before(i: Inputs) -> Tensor:
    loss = losses(i)
    largest = loss.detach()
    loss *= i.mask.view(-1)
    return loss.sum() + largest.max() * i.x.sum()


def read_behind(i: Inputs) -> Tensor:
    loss = losses(i)
    view = loss.view(i.y.shape)
    loss *= i.mask.view(-1)
    return loss.sum() + view[0].sum()


def written_into(i: Inputs) -> Tensor:
    total = i.mask.view(-1) * 2.0
    total += losses(i)
    return total.sum()


def set_to_zero(i: Inputs) -> Tensor:
    loss = losses(i)
    loss[i.y.view(-1) == -100] = 0.0
    return loss.sum()


DECLINED: dict[str, Function] = {
    "read before, as a view": read_before,
    "read behind, as a view": read_behind,
    "written into another tensor": written_into,
    "set by index": set_to_zero,
}


@pytest.mark.parametrize("form", DECLINED)
def test_what_somebody_else_may_read_stays_and_a_remark_says_why(form: str) -> None:
    record = assert_as_eager(DECLINED[form], Inputs())
    assert record.rewrites["chunk_losses"] == 1
    assert record.rewrites["weigh_rows"] == 0
    assert any("made again in the backward" in r.text and r.source for r in record.remarks)
