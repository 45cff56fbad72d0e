"""Contrastive losses in both directions: one operator, eager's numbers, no similarities whole."""

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from bench.meter import Meter
from memopt.backend import read_options
from memopt.passes import PRE_GRAD
from memopt.pipeline import PassContext, Pipeline
from memopt.remarks import RemarkKind
from tests import references
from tests.passes.test_chunk_losses import assert_close, options, run_compiled

PAIRS, SIZE = 300, 8


class Batch(NamedTuple):
    """Two kinds of embeddings `(PAIRS, SIZE)` and the logarithm of the scale."""

    x: Tensor
    y: Tensor
    scale: Tensor

    @classmethod
    def draw(cls, dtype: torch.dtype = torch.float64, *, seed: int = 0) -> "Batch":
        torch.manual_seed(seed)
        x, y = (torch.randn(PAIRS, SIZE, dtype=dtype, requires_grad=True) for _ in range(2))
        return cls(x, y, torch.tensor(1.7, dtype=dtype, requires_grad=True))


Function = Callable[[Batch], Any]


def both(z: Tensor, other: Tensor | None = None) -> Tensor:
    labels = torch.arange(len(z), device=z.device)
    other = z.t() if other is None else other
    return (F.cross_entropy(z, labels) + F.cross_entropy(other, labels)) / 2


def two_products(i: Batch) -> Tensor:
    """As open_clip writes it."""
    x, y = F.normalize(i.x, dim=-1), F.normalize(i.y, dim=-1)
    scale = i.scale.exp()
    return both(scale * x @ y.T, scale * y @ x.T)


def transformers(i: Batch) -> tuple[Tensor, ...]:
    """As Hugging Face's CLIP writes it, without what it returns."""
    x = i.x / i.x.norm(p=2, dim=-1, keepdim=True)
    y = i.y / i.y.norm(p=2, dim=-1, keepdim=True)
    z = torch.matmul(y, x.t().to(y.device))
    z = z * i.scale.exp().to(y.device)

    def contrastive_loss(logits: Tensor) -> Tensor:
        return F.cross_entropy(logits, torch.arange(len(logits), device=logits.device))

    return (contrastive_loss(z) + contrastive_loss(z.T)) / 2.0, x, y


def apart(i: Batch, *, label_smoothing: float = 0.0, **change: Any) -> Tensor:
    z = i.scale * i.x @ i.y.T
    labels = torch.arange(PAIRS)
    a = F.cross_entropy(z, labels, label_smoothing=label_smoothing)
    return a + F.cross_entropy(z.T, labels, label_smoothing=label_smoothing, **change)


def weighed(i: Batch) -> Tensor:
    z, labels = i.x @ i.y.T, torch.arange(0, PAIRS, 1)
    return 0.3 * F.cross_entropy(z, labels) + 0.3 * F.cross_entropy(z.T, labels)


def averaged(i: Batch) -> Tensor:
    z, labels = i.x @ i.y.T, torch.arange(PAIRS).to("cpu")
    return torch.stack([F.cross_entropy(z, labels), F.cross_entropy(z.T, labels)]).mean() ** 2


FUSED: dict[str, Function] = {
    "two products": two_products,
    "transposed": lambda i: both(i.scale * (i.x @ i.y.t())),
    "transposed, mT": lambda i: both(z := i.scale * (i.x @ i.y.t()), z.mT),
    "transformers": lambda i: transformers(i)[0],
    "scaled by a number": lambda i: both(i.x @ i.y.T * 3.5),
    "divided by a number": lambda i: both(i.x @ i.y.T / 0.07),
    "divided by a trained temperature": lambda i: both(i.x @ i.y.T / i.scale),
    "number and tensor": lambda i: both(2.0 * (i.x / i.scale) @ i.y.T),
    "negative scale": lambda i: both(i.x @ i.y.T * -2.0),
    "scale with one dimension": lambda i: both(i.x @ i.y.T * i.scale.exp().view(1)),
    "linear": lambda i: both(F.linear(i.x, i.y)),
    "one matrix with itself": lambda i: both(i.x @ i.x.T),
    "one side detached": lambda i: both(i.x @ i.y.detach().T),
    "sum": apart,
    "weighed alike": weighed,
    "mean of a stack": averaged,
    "part of a larger loss": lambda i: both(i.x @ i.y.T).exp() + i.x.square().mean(),
    "twice": lambda i: both(i.x @ i.y.T) + 2 * both(i.y @ i.x.T * i.scale),
    "scaled by another loss": lambda i: both(i.x @ i.y.T * both(i.y @ i.x.T * 0.5)),
}


def gradients(value: Tensor, batch: Batch) -> list[Tensor | None]:
    return list(torch.autograd.grad(value, list(batch), allow_unused=True))


def rewritten(function: Function, batch: Batch, **chunk: Any) -> fx.Graph:
    """The graph after the passes that run on Dynamo's."""
    graphs: list[fx.Graph] = []

    def backend(gm: fx.GraphModule, _: Any) -> Any:
        Pipeline("pre_grad", PRE_GRAD).run(gm, PassContext(read_options(options(**chunk))))
        graphs.append(gm.graph)
        return gm.forward

    compiled: Any = torch.compile(function, backend=backend)
    compiled(batch)
    (graph,) = graphs
    return graph


@pytest.mark.parametrize("form", FUSED)
def test_every_spelling_becomes_one_operator_with_eagers_numbers(form: str) -> None:
    function, batch = FUSED[form], Batch.draw()
    expected = function(batch)
    wanted = gradients(expected, batch)
    actual, (record,) = run_compiled(function, batch, chunk_rows=70)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)
    assert_close(gradients(actual, batch), wanted)
    remarks = [r for r in record.remarks if r.pass_name == "chunk_losses"]
    assert {r.kind for r in remarks} == {RemarkKind.APPLIED}, remarks
    assert record.rewrites["chunk_losses"] == (
        2 if form in ("twice", "scaled by another loss") else 1
    )
    torch._dynamo.reset()
    graph = rewritten(function, batch)
    names = [str(node.target) for node in graph.nodes if "memopt" in str(node.target)]
    assert set(names) == {"memopt.contrastive.default"}
    values = [node.meta.get("example_value") for node in graph.nodes]
    assert max(v.numel() for v in values if isinstance(v, Tensor)) < PAIRS * PAIRS
