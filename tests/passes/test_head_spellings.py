"""Heads and losses in more spellings: what is found, with eager's numbers, and what is not."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from memopt.remarks import RemarkKind
from tests.passes.compiling import assert_as_eager, assert_near_float64, run_compiled
from tests.passes.one_head import CLASSES, HIDDEN, TOKENS, Function, Inputs, flat, log_probs


def log_softmax(i: Inputs) -> Tensor:
    return torch.log_softmax(flat(F.linear(i.x, i.w)), -1)


def picked(z: Tensor, y: Tensor) -> Tensor:
    return z[torch.arange(TOKENS), y.view(-1)]


FOUND: dict[str, Function] = {
    "cross-entropy of a log-softmax": lambda i: F.cross_entropy(log_softmax(i), i.y.view(-1)),
    "smoothed, of a log-softmax": lambda i: F.cross_entropy(
        log_softmax(i), i.y.view(-1), label_smoothing=0.1, weight=i.weight
    ),
    "log-probabilities by index": lambda i: -picked(log_softmax(i), i.known).mean(),
    "by index, from the last": lambda i: -picked(log_softmax(i), i.known - CLASSES).mean(),
    "by index, masked": lambda i: (
        (picked(log_softmax(i), i.y) * (i.y.view(-1) != -100)).sum() / i.count
    ),
    "logits by index": lambda i: (
        picked(z := flat(F.linear(i.x, i.w)), i.known) - torch.logsumexp(z, -1)
    ).mean(),
    "along a dimension": lambda i: torch.take_along_dim(
        F.linear(i.x, i.w).log_softmax(-1), i.known[..., None], dim=-1
    ).mean(),
    "nll of transposed log-probabilities": lambda i: F.nll_loss(
        F.log_softmax(F.linear(i.x, i.w), -1).transpose(1, 2), i.y
    ),
    "nll of a log-softmax over the second": lambda i: F.nll_loss(
        F.log_softmax(F.linear(i.x, i.w).mT, dim=1), i.y, ignore_index=-100
    ),
    "einsum, dots": lambda i: F.cross_entropy(
        flat(torch.einsum("...d,vd->...v", i.x, i.w)), i.y.view(-1)
    ),
    "einsum, letters": lambda i: F.cross_entropy(
        flat(torch.einsum("b s h, v h -> b s v", i.x, i.w)), i.y.view(-1)
    ),
    "einsum, the weight first": lambda i: F.cross_entropy(
        flat(torch.einsum("vh,bsh->bsv", i.w, i.x)), i.y.view(-1)
    ),
    "einsum, weight the other way round": lambda i: F.cross_entropy(
        flat(torch.einsum("bsh,hv->bsv", i.x, i.w.t().contiguous())), i.y.view(-1)
    ),
    "einsum, classes second": lambda i: F.cross_entropy(
        torch.einsum("bsh,vh->bvs", i.x, i.w), i.y
    ),
    "weight times hidden states": lambda i: F.cross_entropy(i.w @ i.x.transpose(1, 2), i.y),
    "weight times hidden states, and back": lambda i: (
        log_probs(torch.matmul(i.w, i.x.mT).transpose(1, 2), i.known) * i.mask
    ).sum(),
    "addmm": lambda i: F.cross_entropy(
        torch.addmm(i.b, i.x.view(-1, HIDDEN), i.w.t()), i.y.view(-1)
    ),
    "bias and buffer": lambda i: F.cross_entropy(
        flat(F.linear(i.x, i.w, i.b) + i.buffer), i.y.view(-1)
    ),
    "bias, buffer and a number": lambda i: F.cross_entropy(
        flat(i.temperature + (F.linear(i.x, i.w, i.b) + i.buffer)), i.y.view(-1)
    ),
    "one number added": lambda i: (
        torch.logsumexp(F.linear(i.x, i.w) + i.temperature, -1).square().mean()
    ),
}


@pytest.mark.parametrize("form", FOUND)
def test_it_is_found_and_has_eagers_numbers(form: str) -> None:
    record = assert_as_eager(FOUND[form], Inputs(), chunk_rows=5)
    remarks = [r for r in record.remarks if r.pass_name == "chunk_losses"]
    assert [r.kind for r in remarks] == [RemarkKind.APPLIED], remarks


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "form",
    ["cross-entropy of a log-softmax", "einsum, dots", "bias and buffer", "one number added"],
)
def test_low_precision_is_as_near_to_float64_as_eager_is(form: str, dtype: torch.dtype) -> None:
    record = assert_near_float64(FOUND[form], lambda: Inputs(dtype), chunk_rows=5)
    assert record.rewrites["chunk_losses"] == 1


OTHER_ROWS: dict[str, Function] = {
    "rows in reverse": lambda i: (
        -log_softmax(i)[torch.arange(TOKENS - 1, -1, -1), i.known.view(-1)].mean()
    ),
    "a part of the rows": lambda i: -log_softmax(i)[torch.arange(9), i.known.view(-1)[:9]].mean(),
    "rows of a batch": lambda i: (
        -F.linear(i.x, i.w)
        .log_softmax(-1)[torch.arange(4)[:, None], torch.arange(6), i.known]
        .mean()
    ),
    "two batched products": lambda i: F.cross_entropy(
        torch.einsum("bsh,bvh->bsv", i.x, i.w.expand(4, -1, -1)).transpose(1, 2), i.y
    ),
}


@pytest.mark.parametrize("form", OTHER_ROWS)
def test_what_is_not_found_is_left_alone_with_a_remark(form: str) -> None:
    record = assert_as_eager(OTHER_ROWS[form], Inputs())
    assert record.rewrites["chunk_losses"] == 0
    remarks = [r for r in record.remarks if r.pass_name == "chunk_losses"]
    assert [r.kind for r in remarks] == [RemarkKind.MISSED], remarks
    assert all(r.source and "test_head_spellings" in r.source for r in remarks)


def test_a_class_that_is_out_of_bounds_by_index_is_still_an_error() -> None:
    inputs = Inputs()
    inputs.known[1, 2] = CLASSES
    with pytest.raises(IndexError):
        run_compiled(FOUND["log-probabilities by index"], inputs)


@pytest.mark.parametrize("logits", ["lazy", "keep"])
def test_logits_that_are_returned_with_two_biases_are_eagers(logits: str) -> None:
    def function(i: Inputs) -> tuple[Tensor, Tensor]:
        z = F.linear(i.x, i.w, i.b) + i.buffer
        return F.cross_entropy(flat(z), i.y.view(-1)), z

    record = assert_as_eager(function, Inputs(), logits=logits)
    missed = [r.text for r in record.remarks if r.kind is RemarkKind.MISSED]
    assert any("two biases" in text for text in missed) == (logits == "lazy")


@pytest.mark.parametrize("logits", ["lazy", "keep"])
def test_logits_that_are_returned_with_classes_second_are_eagers(logits: str) -> None:
    def function(i: Inputs) -> tuple[Tensor, Tensor]:
        z = i.w @ i.x.transpose(1, 2)
        return F.cross_entropy(z, i.y), z

    assert_as_eager(function, Inputs(), logits=logits)
