"""A product of a head's size that reaches a loss and is not chunked has a remark that says why."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from memopt.remarks import Remark, RemarkKind
from tests.passes.compiling import assert_as_eager, run_compiled
from tests.passes.one_head import CLASSES, Function, Inputs, flat


def embeddings(i: Inputs) -> Tensor:
    return F.normalize(i.w, dim=-1)


def simclr(i: Inputs, fill: float = -9e15) -> Tensor:
    z = embeddings(i)
    similarities = (z @ z.T / 0.5).masked_fill(torch.eye(CLASSES, dtype=torch.bool), fill)
    return F.cross_entropy(similarities, torch.arange(CLASSES).roll(CLASSES // 2))


def moco(i: Inputs) -> Tensor:
    """The positive of each row in the first column, the queue's in all others."""
    q, k = i.x.view(-1, i.x.shape[-1]), i.x.detach().view(-1, i.x.shape[-1])
    positive = torch.einsum("nc,nc->n", [q, k]).unsqueeze(-1)
    negative = torch.einsum("nc,kc->nk", [q, i.w.detach()])
    z = torch.cat([positive, negative], dim=1) / 0.07
    return F.cross_entropy(z, torch.zeros(len(z), dtype=torch.long))


def supcon(i: Inputs) -> Tensor:
    z = embeddings(i)
    similarities = torch.div(z @ z.T, 0.07)
    similarities = similarities - similarities.max(dim=1, keepdim=True)[0].detach()
    others = torch.ones_like(similarities) - torch.eye(CLASSES)
    labels = torch.arange(CLASSES) % 7
    mask = (labels[:, None] == labels).double() * others
    log_prob = similarities - torch.log(
        (torch.exp(similarities) * others).sum(1, keepdim=True) + 1e-9
    )
    return -((mask * log_prob).sum(1) / mask.sum(1)).mean()


def parts(i: Inputs) -> Tensor:
    z, y = torch.split(flat(F.linear(i.x, i.w)), 12), torch.split(i.y.view(-1), 12)
    return F.cross_entropy(z[0], y[0]) + F.cross_entropy(z[1], y[1])


def two_heads(i: Inputs) -> Tensor:
    z = torch.cat([F.linear(i.x, i.w), F.linear(2 * i.x, i.w[:150])], dim=-1)
    return F.cross_entropy(z.transpose(1, 2), i.y)


MISSED: dict[str, tuple[Function, list[str]]] = {
    "SimCLR": (simclr, ["also read by", "masked_fill"]),
    "SimCLR, infinite": (lambda i: simclr(i, -torch.inf), ["also read by", "masked_fill"]),
    "MoCo": (moco, ["reaches cross_entropy", "cat", "stands between"]),
    "SupCon": (supcon, ["reaches log", "sub", "stands between"]),
    "a loss for each part": (parts, ["(cross_entropy)", "split", "stands between"]),
    "a loss for each chunk": (
        lambda i: F.cross_entropy(
            flat(F.linear(i.x, i.w).chunk(2, dim=1)[0]), i.y[:, :3].flatten()
        ),
        ["(cross_entropy)", "chunk", "stands between"],
    ),
    "two heads": (two_heads, ["reaches cross_entropy", "cat", "stands between"]),
    "batched": (
        lambda i: F.cross_entropy(torch.bmm(i.w.expand(4, -1, -1), i.x.mT), i.y),
        ["reaches cross_entropy", "bmm", "no linear layer that is known"],
    ),
    "a convolution": (
        lambda i: F.cross_entropy(F.conv1d(i.x.mT, i.w[..., None]), i.y),
        ["reaches cross_entropy", "conv1d", "no linear layer that is known"],
    ),
    "masked classes": (
        lambda i: F.cross_entropy(
            flat(torch.where(i.weight > 0.5, F.linear(i.x, i.w), -1e9)), i.y.view(-1)
        ),
        ["also read by", "where"],
    ),
}


def of_the_pass(remarks: tuple[Remark, ...] | list[Remark]) -> list[Remark]:
    return [r for r in remarks if r.pass_name == "chunk_losses"]


@pytest.mark.parametrize("form", MISSED)
def test_one_remark_names_the_node_the_line_and_the_reason(form: str) -> None:
    function, words = MISSED[form]
    record = assert_as_eager(function, Inputs())
    assert record.rewrites["chunk_losses"] == 0
    (remark,) = of_the_pass(record.remarks)
    assert remark.kind is RemarkKind.MISSED
    assert all(word in remark.text for word in words), remark
    assert remark.source is not None
    assert "test_unfollowed" in remark.source


SILENT: dict[str, Function] = {
    "found": lambda i: F.cross_entropy(flat(F.linear(i.x, i.w)), i.y.view(-1)),
    "a few classes": lambda i: F.cross_entropy(
        F.conv1d(i.x.view(1, 1, -1), i.w[:9, None, :1]), i.known.view(1, -1).repeat(1, 16) % 9
    ),
    "a loss of inputs": lambda i: F.cross_entropy(
        flat(i.soft).log() * i.temperature, i.y.view(-1)
    ),
    "attention": lambda i: (i.w @ i.w.T).softmax(-1).matmul(i.w).sum(),
}


@pytest.mark.parametrize("form", SILENT)
def test_nothing_is_missed_where_no_such_product_is(form: str) -> None:
    _, (record,) = run_compiled(SILENT[form], Inputs())
    assert not [r for r in of_the_pass(record.remarks) if r.kind is RemarkKind.MISSED]
