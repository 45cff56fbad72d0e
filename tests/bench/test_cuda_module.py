"""What memopt compiles for CUDA is right, on a GPU or, where there is none, interpreted."""

import importlib.metadata
import json
import shutil
import subprocess
import sys
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from bench.triton import fake_cuda

_TIMEOUT_SECONDS = 600


def report_of(model: str, *options: str) -> dict[str, Any]:
    """What the step of a model is like, in a process of its own."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and (reason := fake_cuda.unavailable()) is not None:
        pytest.skip(reason)
    command = [sys.executable, "-m", "bench.triton.cuda_module", model, "--device", device]
    command += options
    done = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_SECONDS)
    assert done.returncode == 0, done.stderr[-4000:]
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def assert_right_with(kernels: set[str], report: dict[str, Any]) -> None:
    assert report["problems"] == []
    assert kernels <= {launch["kernel"] for launch in report["launches"]}
    if report["device"] == "cpu":
        assert any(launch["kernel"].startswith("triton_") for launch in report["launches"])
        assert all(launch["dram_bytes"] and launch["programs"] for launch in report["launches"])
        assert not any(launch["conflicts"] for launch in report["launches"])


@pytest.mark.parametrize("dtype", ["bfloat16", pytest.param("float32", marks=pytest.mark.slow)])
def test_a_norm_and_a_head_run_our_kernels_beside_inductors(dtype: str) -> None:
    kernels = {"norm_forward", "norm_backward", "cross_entropy_rows"}
    assert_right_with(kernels, report_of("norm_head", "--dtype", dtype))


@pytest.mark.slow
@pytest.mark.parametrize("budget", [[], ["--budget", "min"]], ids=["kept", "least"])
def test_llama_runs_our_kernels_beside_inductors(budget: list[str]) -> None:
    assert_right_with({"cross_entropy_rows"}, report_of("llama", *budget))


def test_where_the_device_cannot_be_made_up_it_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "2.12.1")
    assert "torch 2.12.1 is installed" in str(fake_cuda.unavailable())
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "2.13.0+cpu")
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert "g++ is not installed" in str(fake_cuda.unavailable())


def test_it_comes_before_torch_or_not_at_all() -> None:
    with pytest.raises(ImportError, match="before torch is imported"):
        fake_cuda.preload()
