"""Regions in compiled training steps: the same numbers, from the cache too; and what is timed."""

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

import memopt
from memopt._torch import dynamo_counters, inductor_config
from memopt.config import Config
from memopt.passes import fuse_rows
from memopt.pipeline import PassContext, Pipeline
from memopt.remarks import Remark, RemarkKind
from memopt.rows.choice import choose
from tests.row_functions import add_norm_quantise, calls, swiglu_backward, traced

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


def two_regions(x: Tensor) -> tuple[Tensor, ...]:
    """One that Inductor makes one kernel of, and one that it does not."""
    gate, up, product = swiglu_backward(x, x + 1, x - 1)
    return gate, up, *add_norm_quantise(torch.cumsum(product, 0), x, x[0, 0])


Rewritten = Callable[..., tuple[fx.GraphModule, list[Remark]]]


@pytest.fixture
def rewritten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Rewritten:
    """Runs the pass on two regions as if a GPU were there, with a timer that is made up."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(fuse_rows, "serves", lambda x: True)

    def run(timer: Any, **passes: object) -> tuple[fx.GraphModule, list[Remark]]:
        monkeypatch.setattr(fuse_rows, "choose", functools.partial(choose, timer=timer))
        gm = traced(two_regions, (torch.randn(3, 5, WIDTH),))
        ctx = PassContext(Config.from_options({"passes": passes, "strict": True}))
        Pipeline("post_grad", (fuse_rows.FuseRows(),)).run(gm, ctx)
        return gm, [remark for remark in ctx.remarks if remark.pass_name == NAME]

    return run


def last_is_best(graph: fx.GraphModule, inputs: Sequence[Tensor], device: torch.device) -> float:
    for call in calls(graph):
        assert isinstance(call.args[4], int)
        return 9e-6 - 1e-6 * call.args[4]
    return 1e-5


def inductor_is_best(
    graph: fx.GraphModule, inputs: Sequence[Tensor], device: torch.device
) -> float:
    return 2e-5 if calls(graph) else 1e-5


def not_asked(*anything: object) -> float:
    raise AssertionError("nothing is to be asked")


def test_by_default_what_inductor_cannot_fuse_is_timed(rewritten: Rewritten) -> None:
    gm, (remark,) = rewritten(last_is_best)
    (call,) = calls(gm)
    assert call.args[4] == 2
    assert remark.kind is RemarkKind.APPLIED
    assert "7.0 us against Inductor's 10.0" in remark.text
    x = torch.randn(3, 5, WIDTH)
    for mine, plain in zip(gm(x), two_regions(x), strict=True):
        assert torch.equal(mine, plain)


def test_what_inductor_is_faster_at_is_left_to_it(rewritten: Rewritten) -> None:
    gm, (remark,) = rewritten(inductor_is_best)
    assert calls(gm) == []
    assert remark.kind is RemarkKind.MISSED
    assert "left to Inductor: 20.0 us against Inductor's 10.0" in remark.text


def test_where_it_is_asked_for_everything_is_fused_and_nothing_is_timed(
    rewritten: Rewritten,
) -> None:
    gm, remarks = rewritten(not_asked, fuse_rows=True)
    assert [call.args[4] for call in calls(gm)] == [0, 0]
    assert [remark.kind for remark in remarks] == [RemarkKind.APPLIED] * 2


def test_without_int8_or_bits_in_a_graph_no_region_is_looked_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(fuse_rows, "serves", lambda x: True)
    monkeypatch.setattr(fuse_rows, "choose_regions", not_asked)
    x = torch.randn(3, 5, WIDTH)
    gm = traced(swiglu_backward, (x, x, x))
    assert fuse_rows.FuseRows()(gm.graph, PassContext(Config())) == 0


def test_switched_off_it_times_nothing(rewritten: Rewritten) -> None:
    gm, _ = rewritten(not_asked, fuse_rows=False)
    assert calls(gm) == []


def test_by_default_nothing_is_said_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fuse_rows, "choose", not_asked)
    model, inputs = made()
    (graph,) = memopt.explain(model, *inputs, options={"lowering": "eager"}).graphs
    assert not any(remark.pass_name == NAME for remark in graph.remarks)
