"""Plans on fake tensors: those of a compilation, in no memory, for a device that is not here."""

import functools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import memopt
from bench.meter import Meter
from bench.zoo.language import LanguageModel
from memopt._torch import FakeTensor
from memopt.cli import main
from tests.training import train_step

LAYERS, HIDDEN, VOCAB, TOKENS = 3, 64, 256, 128


def make(batch: int = 2) -> tuple[LanguageModel, dict[str, Any]]:
    """A model whose activations outweigh its gradients, and a batch."""
    torch.manual_seed(0)
    model = LanguageModel(LAYERS, HIDDEN, 176, VOCAB, 4)
    ids = torch.randint(VOCAB, (batch, TOKENS))
    return model, {"ids": ids, "targets": ids.clone()}


@pytest.mark.parametrize("device", ["cpu", "h100"])
@pytest.mark.parametrize("budget", [None, 0.6, "min"])
def test_it_is_the_plan_of_a_compilation(device: str, budget: Any) -> None:
    options = {"memory_budget": budget, "device": device}
    (planned,) = memopt.plan_for(make, device=device, options={"memory_budget": budget}).graphs
    model, inputs = make()
    (compiled,) = memopt.explain(model, options=options, **inputs).graphs
    assert planned.baseline_peak_bytes == compiled.baseline_peak_bytes
    plans = planned.plan, compiled.plan
    peaks = [plan.peak_bytes for plan in plans if plan is not None]
    assert abs(peaks[0] - peaks[1]) <= 0.01 * peaks[1]
    assert planned.step_seconds > 0


def test_the_peak_is_the_measured_one() -> None:
    options: Any = {"memory_budget": 0.6}
    (planned,) = memopt.plan_for(make, device="cpu", options=options).graphs
    model, inputs = make()
    compiled = torch.compile(model, backend="memopt", options=options)
    train_step(compiled, model, inputs)
    model.zero_grad()
    with Meter() as meter:
        train_step(compiled, model, inputs)
    allowed = max(0.01 * meter.peak_bytes, 2**20)
    assert abs(planned.predicted_peak_bytes - meter.peak_bytes) <= allowed


def test_neither_weights_nor_activations_take_memory() -> None:
    def large() -> tuple[Any, dict[str, Any]]:
        model = LanguageModel(4, 1024, 2816, 8192, 16)
        ids = torch.zeros(4, 1024, dtype=torch.long)
        return model, {"ids": ids, "targets": ids}

    with Meter() as meter:
        report = memopt.plan_for(large, device="h100")
    assert meter.peak_bytes < 2**22 < report.predicted_peak_bytes / 50


def test_a_model_may_read_the_rates_of_its_layers() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            first, second = (x.tolist() for x in torch.split(torch.linspace(0, 0.5, 4), [1, 3]))
            rates = [*first, *second, *(x.item() for x in torch.linspace(0, 1, 3))]
            self.layers = nn.ModuleList(nn.Linear(8, 8) for rate in rates if rate < 0.4)
            self.register_buffer("scale", torch.linspace(0, 1, 8))
            for other in (torch.linspace(0, 1, 8, device="cuda"), torch.linspace(0, 1, 10**9)):
                assert isinstance(other, FakeTensor)  # no device, no memory

        def forward(self, x: Tensor) -> Any:
            for layer in self.layers:
                x = layer(x).relu() * self.scale
            return x.sum()

    def make() -> tuple[nn.Module, dict[str, Tensor]]:
        model = Model()
        assert len(model.layers) == 4
        return model, {"x": torch.randn(4, 8)}

    report = memopt.plan_for(make, device="h100")
    assert report.graphs[0].predicted_peak_bytes


def test_a_device_that_is_not_known_is_an_error() -> None:
    with pytest.raises(memopt.ConfigError, match="h100"):
        memopt.plan_for(make, device="h1000")


def test_a_budget_that_nothing_meets_is_an_error() -> None:
    with pytest.raises(memopt.BudgetInfeasibleError):
        memopt.plan_for(make, device="h100", options={"memory_budget": "64KiB"})


def test_the_largest_batch_fits_and_the_next_does_not() -> None:
    limit = memopt.plan_for(
        lambda: make(4), device="h100", options={"memory_budget": "min"}
    ).predicted_peak_bytes
    options = {"memory_budget": int(1.05 * limit)}
    said: list[str] = []
    advice = memopt.advise(make, device="h100", options=options, say=said.append)
    assert advice.report is not None
    assert advice.report.predicted_peak_bytes <= options["memory_budget"]
    assert advice.size >= 4
    with pytest.raises(memopt.BudgetInfeasibleError):
        memopt.plan_for(lambda: make(advice.size + 1), device="h100", options=options)
    assert len(said) >= 3


def test_advice_takes_a_budget_in_bytes() -> None:
    with pytest.raises(memopt.ConfigError, match="number of bytes"):
        memopt.advise(make, device="h100", options={"memory_budget": 0.5})


def test_not_even_one_may_fit() -> None:
    advice = memopt.advise(make, device="h100", options={"memory_budget": "64KiB"})
    assert (advice.size, advice.report) == (0, None)


HERE = f"{__name__}:make"


def test_the_command_prints_a_report_and_writes_a_page(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "plan.html"
    command = ["plan", HERE, "--device", "h100", "--budget", "0.6", "--size", "2"]
    assert main([*command, "--html", str(page)]) == 0
    assert "predicted peak" in capsys.readouterr().out
    assert page.stat().st_size > 1000


def test_the_command_advises(capsys: pytest.CaptureFixture[str]) -> None:
    options = json.dumps({"solver": "greedy"})
    command = ["advise", HERE, "--device", "h100", "--budget", "4MiB", "--most", "4"]
    assert main([*command, "--options", options]) == 0
    said = capsys.readouterr()
    assert "largest size that fits is" in said.out
    assert "fits, with" in said.err


@pytest.mark.parametrize(
    ("command", "reason"),
    [
        (["plan", HERE, "--device", "h1000"], "h100"),
        (["plan", "nowhere:make", "--device", "h100"], "module:function"),
        (["plan", HERE, "--device", "h100", "--options", "{"], "is no JSON"),
        (["plan", HERE, "--device", "h100", "--options", "[]"], "a JSON object"),
        (["advise", HERE, "--device", "h100"], "number of bytes"),
    ],
)
def test_what_is_asked_wrongly_is_told_in_one_line(
    command: list[str], reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(command) == 1
    told = capsys.readouterr().err
    assert told.startswith("memopt: ")
    assert reason in told


def test_more_plans_than_dynamo_compiles_of_one_function() -> None:
    """As when `advise` tries many sizes: code that models share is met once in each."""
    torch._dynamo.reset()
    with torch._dynamo.config.patch(recompile_limit=2, accumulated_recompile_limit=4):
        makers = [functools.partial(make, batch) for batch in range(1, 6)]
        reports = [memopt.plan_for(maker, device="cpu") for maker in makers]
        assert torch._dynamo.config.recompile_limit == 2
    peaks = [report.predicted_peak_bytes for report in reports]
    assert peaks == sorted(set(peaks))
    assert peaks[0] > 0
