"""Values in fewer bits: only what may be rounded, within a bound on the gradient's error."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import memopt
from bench.zoo.language import LanguageModel
from memopt.graph import OpKind, packet_name
from memopt.memory.schedule import Schedule
from memopt.passes.compress import Compress
from memopt.planner.problem import Problem
from tests.graphs import MASKED, OPERATORS, Program, lowered, problem_of, programs, savable
from tests.test_liveness import UNSEEN_BYTES, measured_peak

# The random programs' matrices have rows of 8 entries or so.
ON: dict[str, Any] = {Compress.name: {"group": 16, "least": 64, "error": 1.0}}
Function = Callable[..., Any]


class Perceptron(nn.Module):
    def __init__(self, layers: int = 4, width: int = 256) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(layers))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = F.gelu(layer(x))
        return x.square().mean()


def explained(error: float = 1.0, **options: Any) -> memopt.Report:
    torch._dynamo.reset()
    torch.manual_seed(0)
    own = {"least": 1024, "error": error, **options.pop("compress", {})}
    passes = {Compress.name: own}
    settings: dict[str, Any] = {"lowering": "eager", "memory_budget": 0.7, "passes": passes}
    return memopt.explain(Perceptron(), torch.randn(512, 256), options={**settings, **options})


def held(report: memopt.Report) -> int:
    (graph,) = report.graphs
    return sum(row.kind == "compress" for row in graph.decisions)


@pytest.mark.parametrize("lowering", ["eager", "inductor"])
@pytest.mark.parametrize(("bits", "floats"), [(8, False), (4, False), (8, True)])
def test_the_gradient_is_off_by_what_explain_says(bits: int, floats: bool, lowering: str) -> None:
    form = {"bits": bits, "floats": floats}
    options: dict[str, Any] = {
        "compress": form,
        "lowering": lowering,
        "memory_budget": 0.7,
    }
    report = explained(**options)
    assert held(report) > 0
    assert report.gradient_error is not None
    assert 0 < report.gradient_error < 4 * Compress(bits=bits, floats=floats).loss
    torch.manual_seed(0)
    model, x = Perceptron(), torch.randn(512, 256)
    exact = torch.autograd.grad(model(x), list(model.parameters()))
    passes = {Compress.name: {"least": 1024, "error": 1.0, **form}}
    torch._dynamo.reset()
    settings: Any = {"lowering": lowering, "memory_budget": 0.7, "passes": passes}
    compiled = torch.compile(model, backend="memopt", options=settings)
    mine = torch.autograd.grad(compiled(x), list(model.parameters()))
    off = sum(float((a - b).square().sum()) for a, b in zip(mine, exact, strict=True))
    total = sum(float(b.square().sum()) for b in exact)
    assert (off / total) ** 0.5 == pytest.approx(report.gradient_error, rel=0.05)


@pytest.mark.parametrize("how", ["an argument", "a closure"])
def test_the_error_of_a_function_is_that_of_its_module(how: str) -> None:
    """Parameters are found wherever the function has them from."""
    torch.manual_seed(0)
    model, x = Perceptron(), torch.randn(512, 256)
    options: Any = {
        "lowering": "eager",
        "memory_budget": 0.7,
        "passes": {Compress.name: {"least": 1024, "error": 1.0}},
    }
    expected = memopt.explain(model, x, options=options)
    if how == "an argument":
        report = memopt.explain(lambda m, x: m(x), model, x, options=options)
    else:
        report = memopt.explain(lambda x: model(x), x, options=options)
    assert held(report) == held(expected) > 0
    assert report.gradient_error == pytest.approx(expected.gradient_error)


def test_fewer_bits_are_fewer_bytes() -> None:
    peaks = [
        explained(compress={"bits": bits}, memory_budget="min").predicted_peak_bytes
        for bits in (8, 4)
    ]
    assert peaks[1] <= peaks[0] < explained(error=1e-4, memory_budget="min").predicted_peak_bytes


def test_nothing_is_rounded_unless_it_is_named() -> None:
    torch._dynamo.reset()
    options: Any = {"lowering": "eager", "memory_budget": 0.7}
    report = memopt.explain(Perceptron(), torch.randn(512, 256), options=options)
    assert held(report) == 0
    assert report.gradient_error is None


def test_a_bound_below_one_rounding_allows_none() -> None:
    assert held(explained(error=0.9 * Compress().loss)) == 0


def test_of_what_loops_read_the_squares_add_up() -> None:
    """Each of these is what a GELU's backward reads."""
    one, two = (explained(error=(n + 1.5) ** 0.5 * Compress().loss) for n in (0, 1))
    assert held(one) <= held(two) <= 3


def test_an_error_beyond_the_bound_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Compress, "loss", 1e-6)
    with pytest.warns(UserWarning, match="off by"):
        report = explained(error=1e-4)
    assert report.gradient_error is not None
    assert report.gradient_error > 1e-4


def test_buffers_are_as_they_were() -> None:
    class Normed(Perceptron):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(256)

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(self.norm(x))

    torch._dynamo.reset()
    model = Normed()
    options: Any = {"lowering": "eager", "memory_budget": 0.7}
    x = torch.randn(512, 256)
    memopt.explain(model, x, options={**options, "passes": {Compress.name: {"least": 1024}}})
    assert model.norm.num_batches_tracked is not None
    assert int(model.norm.num_batches_tracked) == 1


def offered(function: Function, *args: Tensor) -> set[str]:
    problem = problem_of(function, *args, memory_budget=0.5, passes=ON)
    return {packet_name(problem.joint.nodes[e.source].target) for e in problem.joint.encodings}


def test_attention_statistics_and_draws_are_not_offered() -> None:
    def attention(x: Tensor, w: Tensor) -> tuple[Tensor]:
        q, k, v = torch.split((x @ w).view(2, 4, 64, 96), 32, -1)
        y = F.scaled_dot_product_attention(q.contiguous(), k.contiguous(), v.contiguous())
        return (F.layer_norm(y, (32,)).square().sum(),)

    def softmax(x: Tensor, w: Tensor) -> tuple[Tensor]:
        return ((F.softmax(x @ w, -1) * torch.rand_like(x @ w)).square().sum(),)

    x, w = torch.randn(512, 48).requires_grad_(), torch.randn(48, 96).requires_grad_()
    names = offered(attention, x, w) | offered(softmax, x, w)
    assert not any("attention" in name or "softmax" in name or "rand" in name for name in names)


def test_the_factor_of_a_weights_gradient_is_offered() -> None:
    def function(x: Tensor, w: Tensor) -> tuple[Tensor]:
        return ((F.gelu(x @ w) @ w).square().sum(),)

    assert "aten.mm" in offered(function, *(torch.randn(64, 64).requires_grad_() for _ in "xw"))


def rounded_sums(schedule: Schedule, problem: Problem) -> list[int]:
    """What is run again from a rounded value, and is no loop."""
    decoded = {e.decoded for e in problem.joint.encodings if e.encoded in schedule.saved}
    again, wrong = set(schedule.recomputed), []
    for i in schedule.backward:
        if i in again and decoded.intersection(schedule.behind.inputs[i]):
            decoded.add(i)
            if schedule.behind.kind[i] not in (OpKind.POINTWISE, OpKind.VIEW):
                wrong.append(i)
    return wrong


@settings(max_examples=40)
@given(programs(names=(*OPERATORS, *MASKED), is_loss=True), st.data())
def test_nothing_but_loops_is_run_again_from_a_rounded_value(
    program: Program, data: st.DataObject
) -> None:
    passes = {Compress.name: {"group": 16, "least": 8, "error": 1.0}}
    problem = problem_of(program, *program.arguments(), memory_budget="min", passes=passes)
    candidates = [*savable(problem), *(e.encoded for e in problem.joint.encodings)]
    wanted = data.draw(st.sets(st.sampled_from(candidates or [-1]))) - {-1}
    schedule = problem.evaluate(wanted, "random").liveness.schedule
    assert rounded_sums(schedule, problem) == []


@pytest.mark.parametrize("budget", [0.7, "min"])
def test_the_predicted_peak_is_the_measured_one(budget: float | str) -> None:
    def function(*tensors: Tensor) -> tuple[Tensor]:
        x, *weights = tensors
        for w in weights:
            x = torch.tanh(x @ w)
        return (x.square().sum(),)

    arguments = [torch.randn(64, 64, dtype=torch.float64).requires_grad_() for _ in range(5)]
    captured = lowered(function, memory_budget=budget, passes=ON)
    measured = measured_peak(captured, arguments)
    assert 0 <= measured - captured.outcome.chosen.peak_bytes <= UNSEEN_BYTES


def test_a_language_model_trains_within_the_bound() -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)
    model, ids = LanguageModel(2, 128, 256, 128, 4), torch.randint(128, (4, 128))
    passes = {Compress.name: {"least": 1024, "error": 0.05}}
    options: Any = {"lowering": "eager", "memory_budget": 0.5, "passes": passes}
    report = memopt.explain(model, ids=ids, targets=ids.clone(), options=options)
    assert held(report) > 0
    assert report.gradient_error is not None
    assert 0 < report.gradient_error <= 0.05


@pytest.mark.parametrize(
    ("option", "value"), [("bits", 3), ("group", 100), ("error", 0.0), ("error", "much")]
)
def test_other_options_are_refused(option: str, value: Any) -> None:
    with pytest.raises(memopt.ConfigError, match=option):
        explained(compress={option: value})
