"""Hundreds of steps: the curve of eager. Thousands: no byte, tensor or object more than before."""

import sys
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from memopt import cache as caches
from memopt.kernels.host import ARENA
from tests.cache_models import EXACT, prompts, tiny
from tests.long_runs import Held, batches, curve, family
from tests.references import assert_within_reference_error
from tests.training import in_float64

STEPS = 200
slow = pytest.mark.slow


def compiled(model: nn.Module, budget: Any) -> Any:
    """By the eager lowering."""
    options: dict[str, Any] = {"lowering": "eager", "memory_budget": budget, "strict": True}
    return torch.compile(model, backend="memopt", options=options)


@pytest.mark.parametrize("dropout", [False, True])
@pytest.mark.parametrize(
    "budget", ["min", pytest.param(0.6, marks=slow), pytest.param(None, marks=slow)]
)
def test_two_hundred_steps_have_the_losses_of_eager(budget: Any, dropout: bool) -> None:
    """With the same masks where there is dropout: the eager lowering draws as eager does."""
    data = batches(STEPS)
    expected = curve(model := family("plain", dropout=dropout), model, data)
    model = family("plain", dropout=dropout)
    actual = curve(compiled(model, budget), model, data)
    assert expected[-10:].mean() < 0.7 * expected[0]  # it learns
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=0)


@slow
@pytest.mark.parametrize("budget", ["min", 0.6, None])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_two_hundred_steps_are_as_near_to_float64_as_eager(name: str, budget: Any) -> None:
    """Models that compute their losses in float32; GPT-2 with dropout."""
    data, dropout = batches(STEPS), name == "gpt2"
    models = [family(name, dropout=dropout) for _ in range(3)]
    exact = curve(in_float64(models[0]), models[0], data)
    eager = curve(models[1], models[1], data)
    actual = curve(compiled(models[2], budget), models[2], data)
    assert_within_reference_error([actual], [exact], [eager], times=3.0)


SOAK, WARM = 2000, 200
AWAY = {"simulate": True, "least": 1024, "bandwidth": 1e10}
HOLDS: dict[str, dict[str, Any]] = {
    "nothing": {},
    "offload": {"offload": AWAY},
    "files": {"offload_to_files": {"least": 1024, "directory": "", "bandwidth": 1e10}},
    "compress": {"compress": {"least": 1024, "group": 16}},
    "lazy logits": {"chunk_losses": {"chunk_rows": 16, "logits": "lazy"}},
    "kept logits": {"chunk_losses": {"chunk_rows": 16, "logits": "keep"}},
}


def steps_of(name: str, tmp_path: Path) -> Generator[None]:
    """Training without end."""
    passes = {key: dict(value) for key, value in HOLDS.get(name, {}).items()}
    if "offload_to_files" in passes:
        passes["offload_to_files"]["directory"] = str(tmp_path)
    model = family("llama")
    options: dict[str, Any] = {
        "lowering": "eager",
        "memory_budget": "min",
        "strict": True,
        "passes": passes,
    }
    run = torch.compile(model, backend="memopt", options=options)
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-4)
    lengths = (16, 32, 24, 48) if name == "changing lengths" else (32,)
    data = batches(64, lengths)
    while True:
        for batch in data:
            out = run(**batch)
            if name == "lazy logits":
                accuracy = (out.logits.argmax(-1) == batch["labels"]).sum()
                assert accuracy >= 0
            out.loss.backward()
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
            del out
            yield


def generations(kind: str) -> Generator[None]:
    """Decoding without end, with a new cache for every prompt."""
    model = tiny("llama")
    model.set_attn_implementation("sdpa")
    caches.prepare(model)
    given = prompts(padding=(0, 0))
    with torch.no_grad():
        while True:
            cache = EXACT[kind](model.config)
            past = model(**given, past_key_values=cache, use_cache=True)
            token = past.logits[:, -1:].argmax(-1)
            for _ in range(7):
                token = model(
                    input_ids=token, past_key_values=cache, use_cache=True
                ).logits.argmax(-1)
                yield


@slow
@pytest.mark.parametrize("name", [*HOLDS, "changing lengths", *(f"cache {k}" for k in EXACT)])
def test_two_thousand_steps_hold_no_more_than_two_hundred(name: str, tmp_path: Path) -> None:
    kind = name.removeprefix("cache ")
    steps = generations(kind) if kind != name else steps_of(name, tmp_path)
    for _ in range(WARM):
        next(steps)
    before = Held.now()
    for _ in range(SOAK - WARM):
        next(steps)
    after = Held.now()
    print(f"{name}: {before} -> {after}", file=sys.stderr)
    assert after.tensors <= before.tensors
    assert after.tensor_bytes <= before.tensor_bytes
    assert after.objects <= before.objects + 50  # interned numbers, a line of a log
    assert after.resident_bytes <= before.resident_bytes + 2**22  # the allocator's own pages
    steps.close()
    assert ARENA.held_bytes == 0
