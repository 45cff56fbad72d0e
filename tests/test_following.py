"""Under a budget Inductor follows the plan: each of its habits that lift the peak, held back.

Lowering stops before the kernels are compiled, so that whole models cost seconds.
"""

from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import fx, nn

import memopt.backend
from bench.zoo import MODELS
from memopt.config import Config
from memopt.fusion import NearbyFusion
from memopt.graph import INLINED
from memopt.passes.early_products import EarlyProducts
from memopt.passes.unshare_readers import UnshareReaders
from memopt.pipeline import PassContext
from memopt.proofs import Proof

aten = torch.ops.aten
BOUNDED = Config.from_options({"memory_budget": 0.5})


class LoweredError(Exception):
    """Ends a compilation where the code is emitted and certified."""


@pytest.fixture
def attempts(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[tuple[int, int]]]:
    """Lower a model under a budget; give the model's and the certified peak of each attempt."""
    seen: list[tuple[int, int]] = []

    def record(key: str, codes: Any, proof: Proof) -> None:
        assert proof.planned_peak_bytes is not None
        assert proof.emitted is not None
        seen.append((proof.planned_peak_bytes, proof.emitted.peak_bytes))

    def stop(*_: Any) -> None:
        raise LoweredError

    monkeypatch.setattr(memopt.backend, "remember", record)
    monkeypatch.setattr("memopt.diagnosis.require_fit", stop)
    monkeypatch.setattr(
        "torch._inductor.codecache.PyCodeCache.load_by_key_path",
        lambda key, path, *_, **__: SimpleNamespace(__file__=path, call=None),
    )

    def run(model: nn.Module, inputs: Any, budget: Any) -> list[tuple[int, int]]:
        options = {"memory_budget": budget}
        with (
            torch._inductor.config.patch(force_disable_caches=True),
            pytest.raises(Exception, match="LoweredError"),
        ):
            torch.compile(model, backend="memopt", options=options)(**inputs)
        return seen

    return run


@pytest.mark.parametrize(("name", "size"), [("lm8", "tiny"), ("gpt2", "bench"), ("unet", "tiny")])
def test_the_emitted_code_peaks_where_the_model_says_it_does(
    name: str, size: str, attempts: Callable[..., list[tuple[int, int]]]
) -> None:
    model, inputs = MODELS[name].make(size)
    ((modelled, certified),) = attempts(model, inputs, "min")
    assert certified == pytest.approx(modelled, rel=0.02)


def test_a_first_attempt_leaves_a_little_room_and_is_the_only_one(
    attempts: Callable[..., list[tuple[int, int]]],
) -> None:
    model, inputs = MODELS["lm8"].make("tiny")
    budget = int(1.75 * 2**20)
    ((modelled, certified),) = attempts(model, inputs, budget)
    assert modelled <= 0.98 * budget
    assert certified <= budget


@dataclass(eq=False)
class FakeNode:
    """As much of a scheduler's node as the choices look at."""

    order: int
    extern: bool = False

    @property
    def min_order(self) -> int:
        return self.order

    @property
    def max_order(self) -> int:
        return self.order

    def is_extern(self) -> bool:
        return self.extern

    def is_template(self) -> bool:
        return False


@dataclass(eq=False)
class FakeScheduler:
    """Its nodes, in order."""

    nodes: list[FakeNode]


@pytest.mark.parametrize("direction", ["vertical", "horizontal"])
def test_loops_fuse_up_to_a_library_call_and_not_across_it(
    direction: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    allowed = staticmethod(lambda *_: True)
    stock = "memopt.fusion.InductorChoices.can_fuse_" + direction
    monkeypatch.setattr(stock, allowed)
    loops = [FakeNode(order) for order in (0, 1, 3, 4)]
    scheduler = FakeScheduler([*loops[:2], FakeNode(2, extern=True), *loops[2:]])
    may_fuse = getattr(NearbyFusion(), "can_fuse_" + direction)
    for a in loops:
        for b in loops:
            assert may_fuse(scheduler, a, b, 0) == ((a.order < 2) == (b.order < 2))
            monkeypatch.setattr(stock, staticmethod(lambda *_: False))
            assert not may_fuse(scheduler, a, b, 0)
            monkeypatch.setattr(stock, allowed)


def graph_of(function: Callable[..., Any], *inputs: torch.Tensor) -> fx.GraphModule:
    traced: fx.GraphModule = torch.fx.experimental.proxy_tensor.make_fx(
        function, tracing_mode="fake"
    )(*inputs)
    return traced


def targets(gm: fx.GraphModule) -> list[str]:
    return [str(n.target) for n in gm.graph.nodes if n.op == "call_function"]


def matrices(count: int) -> list[torch.Tensor]:
    return list(torch.randn(count, 8, 8).unbind())


def two_sums(a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """``far`` is added after another product, ``near`` at once."""
    far = aten.mm.default(a, b)
    near = aten.mm.default(b, a)
    near = aten.add.Tensor(near, a)
    return aten.add.Tensor(far, near), near


def test_a_product_is_kept_where_it_is_if_its_sum_comes_behind_another_call() -> None:
    inputs = matrices(2)
    gm = graph_of(two_sums, *inputs)
    assert EarlyProducts()(gm.graph, PassContext(BOUNDED)) == 1
    gm.recompile()
    names = targets(gm)
    assert names.count("aten.add.Tensor") == 1  # the near one may become an addmm
    assert names[-2:] == ["aten.neg.default", "aten.sub.Tensor"]
    for actual, expected in zip(gm(*inputs), two_sums(*inputs), strict=True):
        assert torch.equal(actual, expected)


def test_a_scaled_sum_or_a_sum_of_one_value_is_left_alone() -> None:
    def scaled(a: torch.Tensor, b: torch.Tensor) -> Any:
        far = aten.mm.default(a, b)
        near = aten.mm.default(b, a)
        return aten.add.Tensor(near, far, alpha=2), aten.add.Tensor(far, far)

    gm = graph_of(scaled, *matrices(2))
    assert EarlyProducts()(gm.graph, PassContext(BOUNDED)) == 0


def shared_value(a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """One exponential, read before and after a product, twice after it."""
    value = aten.exp.default(a)
    early = aten.mul.Tensor(value, b)
    product = aten.mm.default(early, b)
    return aten.mul.Tensor(value, product), aten.sub.Tensor(value, product)


def test_readers_on_either_side_of_a_call_get_a_copy_each() -> None:
    inputs = matrices(2)
    gm = graph_of(shared_value, *inputs)
    (value,) = gm.graph.find_nodes(op="call_function", target=aten.exp.default)
    assert UnshareReaders()(gm.graph, PassContext(BOUNDED)) == 0  # it is written to memory
    value.meta[INLINED] = True
    assert UnshareReaders()(gm.graph, PassContext(BOUNDED)) == 1
    gm.graph.lint()
    gm.recompile()
    exp, mul, mm, copy, *_ = targets(gm)
    assert (exp, copy) == ("aten.exp.default", "aten.exp.default")
    assert (mul, mm) == ("aten.mul.Tensor", "aten.mm.default")
    for actual, expected in zip(gm(*inputs), shared_value(*inputs), strict=True):
        assert torch.equal(actual, expected)


def test_a_random_draw_is_never_copied() -> None:
    def draw(a: torch.Tensor, b: torch.Tensor) -> Any:
        noise = aten.rand_like.default(a)
        return aten.mul.Tensor(noise, aten.mm.default(aten.mul.Tensor(noise, a), b))

    gm = graph_of(draw, *matrices(2))
    for node in gm.graph.nodes:
        node.meta[INLINED] = True
    assert UnshareReaders()(gm.graph, PassContext(BOUNDED)) == 0


@pytest.mark.parametrize("a_pass", [EarlyProducts(), UnshareReaders()])
def test_without_a_budget_inductor_does_as_it_pleases(a_pass: Any) -> None:
    gm = graph_of(two_sums, *matrices(2))
    for node in gm.graph.nodes:
        node.meta[INLINED] = True
    assert a_pass(gm.graph, PassContext(Config.from_options({}))) == 0
