"""``logits="keep"``: returned logits are what the loss computed anyway."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx

from bench.meter import Meter
from memopt.backend import compile_graph, read_options
from memopt.kernels import linear_cross_entropy
from memopt.kernels.kept_logits import KEPT
from memopt.kernels.linear_cross_entropy import REDUCED
from memopt.passes import PRE_GRAD
from memopt.pipeline import PassContext, Pipeline
from tests.references import assert_draws_within_reference_error

CLASSES = 307


class Inputs:
    """A head whose first tokens have no label."""

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        self.x, self.w = torch.randn(3, 7, 16).to(dtype), torch.randn(CLASSES, 16).to(dtype)
        self.b = torch.randn(CLASSES).to(dtype)
        self.y = torch.randint(0, CLASSES, (3, 7))
        self.y[:, :3] = -100
        for tensor in (self.x, self.w, self.b):
            tensor.requires_grad_()


Function = Callable[[Inputs], tuple[Tensor, ...]]


def entropy(z: Tensor, i: Inputs, **more: Any) -> Tensor:
    return F.cross_entropy(z.view(-1, CLASSES).float(), i.y.view(-1), **more)


def plain(i: Inputs) -> tuple[Tensor, ...]:
    z = F.linear(i.x, i.w)
    return entropy(z, i), z


def capped(i: Inputs) -> tuple[Tensor, ...]:
    z = F.linear(i.x, i.w, i.b)
    z = torch.tanh(z / 3.0) * 3.0
    return entropy(z, i, reduction="sum") / 5, z.float(), z[:, -1:]


def buffered(i: Inputs) -> tuple[Tensor, ...]:
    z = F.linear(i.x, i.w) + i.b.detach()
    return entropy(z, i), z


def shifted(i: Inputs) -> tuple[Tensor, ...]:
    z = F.linear(i.x, i.w)
    loss = F.cross_entropy(z[:, :-1].reshape(-1, CLASSES), i.y[:, 1:].reshape(-1))
    return loss, z


def two_losses(i: Inputs) -> tuple[Tensor, ...]:
    z = F.linear(i.x, i.w)
    return entropy(z, i) + z.logsumexp(-1).square().mean(), z


IN_THE_LOOP: dict[str, Function] = {"plain": plain, "capped": capped}
APART: dict[str, Function] = {"buffered": buffered, "shifted": shifted, "two losses": two_losses}


def run(function: Function, i: Inputs) -> list[Tensor]:
    for tensor in (i.x, i.w, i.b):
        tensor.grad = None
    loss, *logits = function(i)
    torch.autograd.backward(loss)
    made = [t.grad.clone() for t in (i.x, i.w, i.b) if t.grad is not None]
    return [loss.detach(), *(z.detach() for z in logits), *made]


def compiled(function: Function, lowering: str = "eager") -> tuple[Function, list[fx.Graph]]:
    """The function, and its graphs after the passes."""
    chunks = {"logits": "keep", "chunk_rows": 4}
    options = {"lowering": lowering, "strict": True, "passes": {"chunk_losses": chunks}}
    config, graphs = read_options(options), list[fx.Graph]()

    def backend(gm: fx.GraphModule, inputs: Sequence[Any]) -> Any:
        Pipeline("pre_grad", PRE_GRAD).run(gm, PassContext(config))
        graphs.append(gm.graph)
        return compile_graph(gm, inputs, config)

    torch._dynamo.reset()
    return torch.compile(function, backend=backend, dynamic=False), graphs


@pytest.mark.parametrize("lowering", ["eager", "inductor"])
@pytest.mark.parametrize("form", [*IN_THE_LOOP, *APART])
def test_kept_logits_and_gradients_are_eagers(form: str, lowering: str) -> None:
    function, inputs = {**IN_THE_LOOP, **APART}[form], Inputs()
    expected = run(function, inputs)
    mine, graphs = compiled(function, lowering)
    actual = run(mine, inputs)
    assert not any(z.requires_grad for z in mine(inputs)[1:])
    targets = [node.target for node in graphs[0].nodes]
    assert (KEPT in targets) == (form in IN_THE_LOOP)
    assert (F.linear in targets) == (form in APART)
    assert len(actual) == len(expected)
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("form", IN_THE_LOOP)
def test_low_precision_is_as_near_to_float64_as_eager_is(form: str, dtype: torch.dtype) -> None:
    function = IN_THE_LOOP[form]
    mine, _ = compiled(function)

    def draw() -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        inputs, wide = Inputs(dtype), Inputs()
        for name in ("x", "w", "b"):
            setattr(wide, name, getattr(inputs, name).detach().double().requires_grad_())
        wide.y = inputs.y
        return run(mine, inputs), run(function, wide), run(function, inputs)

    assert_draws_within_reference_error(draw, 20)


def test_evaluation_keeps_logits_too() -> None:
    inputs = Inputs()
    mine, _ = compiled(plain)
    with torch.no_grad():
        for a, e in zip(mine(inputs), plain(inputs), strict=True):
            torch.testing.assert_close(a, e)


def arguments(rows: int, classes: int, dtype: torch.dtype) -> tuple[Any, ...]:
    x, w = torch.randn(rows, 16, dtype=dtype), torch.randn(classes, 16, dtype=dtype)
    y = torch.randint(0, classes, (rows,))
    y[::3] = -100
    return x, w, None, y, None, -100, 0.0, 1.0, 0.0, 16, [True, True, False], True


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_besides_the_logits_it_allocates_what_the_loss_does(dtype: torch.dtype) -> None:
    args = arguments(128, 3000, dtype)
    KEPT(*args)
    with Meter("cpu") as meter:
        result = KEPT(*args)
    measured = meter.peak_bytes - meter.end_bytes
    assert abs(linear_cross_entropy.scratch_bytes(*args) - measured) <= measured // 100 + 4096
    for mine, plain_one in zip(result, REDUCED(*args), strict=False):
        assert torch.equal(mine, plain_one)


def test_torch_finds_the_operator_in_order() -> None:
    torch.library.opcheck(KEPT, arguments(9, 300, torch.float64))
