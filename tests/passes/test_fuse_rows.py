"""Regions in compiled training steps: the same numbers, from the cache too, where asked for."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import memopt
from memopt._torch import dynamo_counters, inductor_config

NAME = "fuse_rows"
WIDTH = 64


class Block(nn.Module):
    """A norm with a residual, a gated product and a saved mask."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.Parameter(torch.rand(WIDTH))
        self.gate, self.up = (nn.Linear(WIDTH, 2 * WIDTH, bias=False) for _ in range(2))
        self.down = nn.Linear(2 * WIDTH, WIDTH, bias=False)

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        total = x + residual
        y = total * torch.rsqrt(total.pow(2).mean(-1, keepdim=True) + 1e-6) * self.norm
        product = nn.functional.silu(self.gate(y)) * self.up(y)
        return torch.tanh(total + self.down(product))


def options(lowering: str, setting: object) -> dict[str, Any]:
    return {"lowering": lowering, "strict": True, "passes": {NAME: setting}}


def step(run: Any, model: nn.Module, *inputs: Tensor) -> list[Tensor]:
    model.zero_grad(set_to_none=True)
    result = run(*inputs)
    result.square().sum().backward()
    return [result.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


def made(rows: int = 6) -> tuple[Block, tuple[Tensor, Tensor]]:
    torch.manual_seed(0)
    return Block(), (torch.randn(2, rows, WIDTH), torch.randn(2, rows, WIDTH))


@pytest.mark.parametrize("lowering", ["eager", "inductor"])
def test_a_step_has_the_same_numbers(lowering: str) -> None:
    model, inputs = made()
    (graph,) = memopt.explain(model, *inputs, options=options(lowering, {"cpu": True})).graphs
    assert graph.rewrites[NAME] >= 3
    assert any(r.pass_name == NAME and "one kernel" in r.text for r in graph.remarks)
    run = torch.compile(model, backend="memopt", options=options(lowering, {"cpu": True}))
    for mine, plain in zip(step(run, model, *inputs), step(model, model, *inputs), strict=True):
        torch.testing.assert_close(mine, plain)


def test_other_lengths_need_no_new_code() -> None:
    model, _ = made()
    dynamo_counters.clear()
    run = torch.compile(
        model, backend="memopt", options=options("eager", {"cpu": True}), dynamic=True
    )
    for rows in (6, 9, 31):
        _, inputs = made(rows)
        for mine, plain in zip(
            step(run, model, *inputs), step(model, model, *inputs), strict=True
        ):
            torch.testing.assert_close(mine, plain)
    assert dynamo_counters["stats"]["unique_graphs"] == 1


def test_what_is_compiled_comes_back_from_the_cache(tmp_path: Any) -> None:
    model, inputs = made()
    found = []
    with inductor_config.patch(fx_graph_cache=True):
        for _ in range(2):
            torch._dynamo.reset()
            dynamo_counters.clear()
            run = torch.compile(
                model, backend="memopt", options=options("inductor", {"cpu": True})
            )
            found.append(step(run, model, *inputs))
    assert dynamo_counters["aot_autograd"]["autograd_cache_hit"] == 1
    for first, again in zip(*found, strict=True):
        assert torch.equal(first, again)


@pytest.mark.parametrize("setting", [True, False, {"cpu": False}])
def test_the_cpu_is_left_to_inductor(setting: object) -> None:
    model, inputs = made()
    (graph,) = memopt.explain(model, *inputs, options=options("eager", setting)).graphs
    assert graph.rewrites.get(NAME, 0) == 0
