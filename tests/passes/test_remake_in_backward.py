"""What a backward can make once more is not held for it."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import memopt
from memopt.kernels.norm import NORM
from tests.references import assert_within_reference_error


class Block(nn.Module):
    """A norm and two products that read it, as in attention or a gated layer."""

    def __init__(self, width: int = 64, *, fused: bool = True, activation: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(width))
        self.one = nn.Linear(width, width, bias=False)
        self.two = nn.Linear(width, width, bias=False)
        self.fused, self.activation = fused, activation

    def forward(self, x: Tensor) -> Tensor:
        if self.fused:
            y = NORM(x, None, self.weight, None, 1e-6, 0.0, False)[0]
        else:
            y = F.rms_norm(x, x.shape[-1:], self.weight, 1e-6)
        if self.activation:
            y = F.silu(y)
        result: Tensor = x + self.one(y) * self.two(y)
        return result


class Stack(nn.Module):
    """Blocks, and a loss."""

    def __init__(self, count: int = 3, **options: bool) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*(Block(**options) for _ in range(count)))

    def forward(self, x: Tensor) -> Tensor:
        loss: Tensor = self.blocks(x).square().mean()
        return loss


def report(*, remake: bool = True, **options: bool) -> memopt.Report:
    torch.manual_seed(0)
    x = torch.randn(32, 64, requires_grad=True)
    passes = {"remake_in_backward": remake}
    return memopt.explain(Stack(**options), x, options={"lowering": "eager", "passes": passes})


def test_the_norms_of_all_blocks_are_no_longer_held() -> None:
    (graph,), (plain,) = report().graphs, report(remake=False).graphs
    assert graph.rewrites["remake_in_backward"] == 3
    assert plain.saved_bytes - graph.saved_bytes == 3 * 32 * 64 * 4
    assert graph.recompute_seconds == plain.recompute_seconds


def test_what_the_backward_reads_too_early_stays_and_a_remark_says_so() -> None:
    (graph,) = report(activation=True).graphs
    assert graph.rewrites["remake_in_backward"] == 0
    texts = [r.text for r in graph.remarks if r.pass_name == "remake_in_backward"]
    assert len(texts) == 3
    assert all("before" in text for text in texts)


@pytest.mark.parametrize("lowering", ["eager", "inductor"])
def test_gradients_are_as_near_to_float64_as_eager_ones(lowering: str) -> None:
    torch.manual_seed(0)
    model = Stack()
    x = torch.randn(32, 64, requires_grad=True)

    def gradients(run: Any, like: nn.Module, x: Tensor) -> list[Tensor]:
        like.zero_grad()
        run(x).backward()
        return [p.grad.clone() for p in like.parameters() if p.grad is not None]

    plain = Stack(fused=False)
    plain.load_state_dict(model.state_dict())
    low = gradients(plain, plain, x.detach())
    exact = gradients(plain.double(), plain, x.detach().double())
    compiled = torch.compile(model, backend="memopt", options={"lowering": lowering})
    assert_within_reference_error(gradients(compiled, model, x.detach()), exact, low)
