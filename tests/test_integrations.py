"""The examples of docs/examples, with memopt and without: the same losses, in fewer bytes."""

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook

import memopt
from bench.meter import Meter
from memopt.errors import ConfigError

EXAMPLES = Path(__file__).parents[1] / "docs" / "examples"
OPTIONS: dict[str, Any] = {"memory_budget": 0.9, "lowering": "eager", "strict": True}


@pytest.fixture(autouse=True)
def paths(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Examples import one another as scripts do, and write nothing beside the tests."""
    monkeypatch.syspath_prepend(EXAMPLES)
    monkeypatch.chdir(tmp_path)


def example(name: str, *libraries: str) -> Any:
    """An example as a module; skips where a library is missing."""
    for library in libraries:
        pytest.importorskip(library, exc_type=ImportError)
    return importlib.import_module(name)


@contextmanager
def last_step(steps: int) -> Iterator[Meter]:
    """Measures from the end of the last but one optimiser step to the end of the last."""
    meter, done = Meter("cpu"), 0

    def hook(*_: Any) -> None:
        nonlocal done
        done += 1
        if done == steps - 1:
            meter.__enter__()
        elif done == steps:
            meter.__exit__(None, None, None)

    handle = register_optimizer_step_post_hook(hook)
    try:
        yield meter
    finally:
        handle.remove()


def assert_trains_alike(module: Any, share: float, *args: Any, **kwargs: Any) -> None:
    """The same losses with memopt, in at most a share of the peak without it."""
    budget = {**OPTIONS, "memory_budget": kwargs.pop("budget", OPTIONS["memory_budget"])}
    steps = 3
    with last_step(steps) as plain:
        expected = module.train(None, *args, steps=steps, **kwargs)
    with last_step(steps) as bounded:
        actual = module.train(budget, *args, steps=steps, **kwargs)
    assert expected[0] != expected[-1]
    assert actual == pytest.approx(expected, rel=1e-5)
    assert bounded.peak_bytes <= share * plain.peak_bytes


@pytest.mark.parametrize("loss", ["the model's", "its own"])
def test_trainer_of_transformers(loss: str) -> None:
    module = example("hf_trainer", "transformers", "accelerate")
    assert_trains_alike(module, 0.5, module.token_mean if loss == "its own" else None)


def test_accelerate() -> None:
    assert_trains_alike(example("accelerate_loop", "transformers", "accelerate"), 0.5)


@pytest.mark.parametrize("adapted", ["all linear layers", "the head is trained whole"])
def test_adapters_of_peft(adapted: str) -> None:
    more = {} if adapted == "all linear layers" else {"modules_to_save": ["lm_head"]}
    assert_trains_alike(example("peft_lora", "transformers", "peft"), 0.5, **more)


def test_sft_trainer_of_trl() -> None:
    assert_trains_alike(example("trl_sft", "transformers", "datasets", "trl"), 0.95, budget="min")


def test_lightning() -> None:
    assert_trains_alike(example("lightning_module", "transformers", "lightning"), 0.5)


@pytest.mark.parametrize(
    ("what", "budget", "share"),
    [("step", 0.5, 0.5), ("model", "min", 0.95), ("blocks", 0.5, 0.95)],
)
def test_a_loop_of_its_own(what: str, budget: Any, share: float) -> None:
    module = example("plain_loop", "transformers")
    assert_trains_alike(module, share, what, budget=budget, accumulate=2)


def test_models_of_timm() -> None:
    assert_trains_alike(example("timm_classifier", "torchvision", "timm"), 0.7, budget=0.6)


def test_label_smoothing_of_the_trainer_makes_no_logits() -> None:
    module = example("hf_trainer", "transformers", "accelerate")
    assert_trains_alike(module, 0.5, label_smoothing_factor=0.1)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("program", "path", "why"),
    [
        (nn.Linear(2, 2), "a.pt2", "what torch.export.export returns"),
        (None, "a.txt", "try 'a.pt2'"),
        (None, "nowhere/a.pt2", "create it first"),
    ],
)
def test_a_package_that_cannot_be_is_refused_at_once(program: Any, path: str, why: str) -> None:
    exported = torch.export.export(nn.Linear(2, 2), (torch.zeros(1, 2),))
    with pytest.raises(ConfigError, match=why):
        memopt.package(program or exported, path)


def test_a_package_of_aotinductor_is_cut_to_the_budget(tmp_path: Path) -> None:
    module = example("aoti_package")
    (model, x), peaks = module.network(), []
    for name, options in ("whole", {}), ("cut", {"memory_budget": "3MiB"}):
        run = module.packaged(tmp_path / f"{name}.pt2", **options)
        with torch.no_grad(), Meter("cpu") as meter:
            actual = run(x)
        torch.testing.assert_close(actual, model(x), check_stride=False)
        peaks.append(meter.peak_bytes)
    assert peaks[1] <= 3 * 2**20 < peaks[0]


def test_pipelines_of_diffusers() -> None:
    module = example("diffusers_pipeline", "diffusers")
    peaks, images = [], []
    for options in (None, {**OPTIONS, "memory_budget": "4MiB"}):
        pipeline = module.pipeline(options)
        module.sample(pipeline)
        with Meter("cpu") as meter:
            images.append(module.sample(pipeline))
        peaks.append(meter.peak_bytes)
    torch.testing.assert_close(images[1], images[0])
    assert peaks[1] <= 4 * 2**20 < peaks[0]
