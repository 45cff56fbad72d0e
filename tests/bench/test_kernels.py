"""The case of kernels by themselves: its rows, its tables, and liger's kernels beside ours."""

import importlib.util
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch

pytest.importorskip("triton")

from bench import kernels, plot
from bench.kernel_tables import (
    code_table,
    compared,
    kernel_section,
    speed_table,
    traffic_table,
)
from bench.libraries import LIBRARIES
from bench.results import header, save
from bench.triton import ahead
from bench.triton.ahead import TARGETS
from bench.triton.operators import operators
from memopt.kernels import specs

SPECS = {spec.name: spec for spec in specs()}
NORM = SPECS["memopt::norm"]
needs_liger = pytest.mark.skipif(
    LIBRARIES["liger"].unavailable("cpu") is not None, reason="liger-kernel is not installed"
)


def rows_of_the_first_norm(device: str = "cpu") -> list[dict[str, Any]]:
    return kernels.run(device, lambda line: None, kernels=[NORM], samples=1)


def row(kind: str, peer: str, **figures: Any) -> dict[str, Any]:
    about = {"kernel": "memopt::norm", "sample": "x 8x64", "status": "ok", "error": ""}
    return {"kind": kind, "case": "kernels", "peer": peer, **about, **figures}


TRAFFIC = [
    row("kernel_traffic", "memopt", ideal_bytes=1024, dram_bytes=1024, l2_bytes=1536),
    row("kernel_traffic", "liger", ideal_bytes=1024, dram_bytes=2048, l2_bytes=4096, form=""),
]
COMPOSED = [TRAFFIC[0], TRAFFIC[1] | {"form": "torch's add, liger's layer norm"}]
NOT_COMPARED = [TRAFFIC[0], row("kernel_traffic", "liger", ideal_bytes=1024, status="skipped")]
CODE = [
    row("kernel_code", "memopt", function="norm_forward", target=target, registers=registers,
        spilled_bytes=0, shared_bytes=16, loads=4, vector_loads=vectors)
    for target in ("90", "gfx942") for registers, vectors in ((40, 3), (64, 4))
]  # fmt: skip
SPEED = [
    row("kernel_speed", "memopt", seconds=2e-6),
    row("kernel_speed", "eager", seconds=6e-6),
    row("kernel_speed", "liger", status="skipped", error="none"),
]


def test_the_first_norm_has_bytes_and_code_for_every_target() -> None:
    rows = rows_of_the_first_norm()
    assert rows == json.loads(json.dumps(rows))
    ours = next(r for r in rows if r["kind"] == "kernel_traffic" and r["peer"] == "memopt")
    x, _, weight, *_ = next(iter(NORM.samples(torch.bfloat16)))
    statistics_bytes = 4 * x.numel() // x.shape[-1]
    assert ours["ideal_bytes"] == 2 * x.nbytes + weight.nbytes + statistics_bytes
    assert 1 <= ours["dram_bytes"] / ours["ideal_bytes"] <= 1.02
    assert ours["sample"] == "x 8x64x1024, weight 1024, eps 1e-06"
    code = [r for r in rows if r["kind"] == "kernel_code"]
    assert [r["target"] for r in code] == [str(target) for target in TARGETS]
    assert all(r["function"] == "norm_forward" and r["registers"] > 0 for r in code)


def test_a_library_that_is_not_installed_is_a_skipped_row(monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.util.find_spec

    def without(name: str) -> Any:
        return None if name == "liger_kernel" else found(name)

    monkeypatch.setattr(importlib.util, "find_spec", without)
    monkeypatch.setattr(ahead, "TARGETS", ())
    liger = [r for r in rows_of_the_first_norm() if r["peer"] == "liger"]
    assert [(r["status"], "not installed" in r["error"]) for r in liger] == [("skipped", True)]


def test_a_kernel_that_does_not_compile_is_a_failed_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ahead, "TARGETS", (90,))
    monkeypatch.setattr(ahead, "compile_for", Mock(side_effect=RuntimeError("out of registers")))
    (code,) = [r for r in rows_of_the_first_norm() if r["kind"] == "kernel_code"]
    assert (code["status"], code["error"]) == ("failed", "RuntimeError: out of registers")
    assert "| failed |" in code_table([code])


def test_without_triton_there_is_one_skipped_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    (only,) = rows_of_the_first_norm()
    assert (only["status"], only["error"]) == ("skipped", "triton is not installed")
    assert kernel_section([only]) == ""


def test_the_tables_hold_ratios() -> None:
    start = "| memopt::norm | x 8x64 | 1.0 | 1.000 | 1.500"
    assert f"{start} | one kernel | 2.000 | 4.000 |" in traffic_table(TRAFFIC)
    words = "torch's add, liger's layer norm"
    assert f"{start} | {words} | 2.000 | 4.000 |" in traffic_table(COMPOSED)
    assert f"{start} | - | - | - |" in traffic_table(NOT_COMPARED)
    assert "| memopt::norm | x 8x64 | 2.0 | 3.00 | - | - |" in speed_table(SPEED)


def test_the_table_of_code_has_the_most_of_each_function() -> None:
    table = code_table(CODE)
    assert "| function | sm_90 | gfx942 |" in table
    assert "| norm_forward | 64 · 0 · 16 · 3/4 | 64 · 0 · 16 · 3/4 |" in table


def test_only_what_liger_has_too_is_compared() -> None:
    assert len(compared(TRAFFIC)) == 1
    assert compared(NOT_COMPARED) == {}


def test_operators_of_torch_read_what_they_are_given_and_write_their_result() -> None:
    x, row = torch.randn(64, 32), torch.randn(32)
    picked = torch.randint(32, (32, 1))
    counts: list[tuple[Callable[[], object], int]] = [
        (lambda: x + row, 2 * x.nbytes + row.nbytes),
        (lambda: x + row.expand(64, 32), 2 * x.nbytes + row.nbytes),
        (lambda: x.t()[3:].view(-1, 2, 32), 0),
        (lambda: x.t().contiguous(), 2 * x.nbytes),
        (lambda: x.contiguous(), 0),
        (lambda: x.add_(1), 2 * x.nbytes),
        (lambda: torch.empty_like(x).copy_(x), 2 * x.nbytes),
        (lambda: torch.zeros_like(x), x.nbytes),
        (lambda: torch.cat([x, x]), 4 * x.nbytes),
        (lambda: x.gather(1, picked), 2 * row.nbytes + picked.nbytes),
        (lambda: torch.sum(x, 0, out=torch.empty(32)), x.nbytes + row.nbytes),
        (lambda: x.sum(0).to(torch.bfloat16), x.nbytes + row.nbytes * 5 // 2),
    ]
    for number, (run, moved) in enumerate(counts):
        with operators() as counter:
            run()
        assert counter.moved_bytes == moved, number


def test_the_page_of_results_has_the_tables_and_a_picture(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    save(path, header(0, "cpu"), [*TRAFFIC, *CODE])
    written = plot.write_all([path], tmp_path)
    assert all(file.exists() for file in written)
    assert (tmp_path / "docs" / "assets" / "run_kernels.png").stat().st_size > 1000
    page = (tmp_path / "docs" / "results.md").read_text()
    assert "### kernels" in page
    assert "Median microseconds" not in page
    assert "| norm_forward |" in page


@needs_liger
def test_speed_is_measured_of_every_peer(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is timed is the same as on a GPU; here nothing is moved, compiled or repeated."""

    def once(launch: Callable[[], object], return_mode: str) -> float:
        launch()
        return 0.002

    monkeypatch.setattr("triton.testing.do_bench", once)
    monkeypatch.setattr(torch.Tensor, "cuda", lambda self: self)
    monkeypatch.setattr(torch, "compile", lambda function, dynamic: function)
    monkeypatch.setattr(ahead, "TARGETS", ())
    spec = replace(NORM, large=None)
    rows = kernels.run("cuda", lambda line: None, kernels=[spec], samples=1)
    speed = {r["peer"]: r["seconds"] for r in rows if r["kind"] == "kernel_speed"}
    assert speed == dict.fromkeys(("memopt", "eager", "inductor", "liger"), 2e-6)


@pytest.mark.gpu
def test_on_a_gpu_every_peer_is_timed() -> None:
    rows = [r for r in rows_of_the_first_norm("cuda") if r["kind"] == "kernel_speed"]
    assert {r["peer"] for r in rows if r["status"] == "ok"} >= {"memopt", "eager", "inductor"}
    assert all(r["seconds"] > 0 for r in rows if r["status"] == "ok")
