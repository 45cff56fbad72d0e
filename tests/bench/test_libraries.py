"""Peers whose head comes from another library."""

import importlib.util

import pytest
import torch
import torch.nn.functional as F

from bench.cases import Case
from bench.libraries import LIBRARIES
from bench.peers import PEERS
from bench.runner import run_case

LIGER, CUT = PEERS["inductor+liger"], PEERS["inductor+cut_cross_entropy"]


def test_a_library_that_is_not_installed_is_skipped_with_the_command(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    case = Case(name="t", model="llama", size="tiny", peers=(LIGER.name, CUT.name))
    rows = list(run_case(case, device="cpu", repeats=1, seed=0, say=lambda line: None))
    assert [row.status for row in rows] == ["skipped", "skipped"]
    assert rows[0].error == "liger_kernel is not installed; run: pip install 'memopt[bench]'"
    assert rows[1].error == "cut-cross-entropy runs on cuda only"
    assert "not installed" in str(CUT.unavailable("cuda"))


@pytest.mark.parametrize("missing", ["liger_kernel", "triton"])
def test_interpreting_a_library_takes_triton_too(
    monkeypatch: pytest.MonkeyPatch, missing: str
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == missing else 1)
    assert missing in str(LIGER.unavailable("cpu"))


def test_peers_are_timed_but_where_their_kernels_are_interpreted() -> None:
    assert not LIGER.is_timed_on("cpu")
    assert LIGER.is_timed_on("cuda")
    assert all(peer.is_timed_on("cpu") for peer in PEERS.values() if peer is not LIGER)
    own = [peer for peer in PEERS.values() if not (peer.library or peer.offload)]
    assert all(peer.unavailable("cpu") is None for peer in own)


@pytest.mark.parametrize("name", ["torch", "liger"])
def test_every_library_computes_the_same_loss_on_the_cpu(name: str) -> None:
    library = LIBRARIES[name]
    if (reason := library.unavailable("cpu")) is not None:
        pytest.skip(reason)
    rows, weight = (torch.randn(n, 16, requires_grad=True) for n in (12, 100))
    targets = torch.randint(100, (12,))
    targets[3] = -100
    mine = library.loss("cpu")(rows, weight, targets)
    plain = F.cross_entropy(rows @ weight.t(), targets)
    torch.testing.assert_close(mine, plain)
    gradients = (torch.autograd.grad(loss, (rows, weight)) for loss in (mine, plain))
    for actual, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_a_step_with_an_interpreted_head_has_bytes_and_no_times() -> None:
    if (reason := LIGER.unavailable("cpu")) is not None:
        pytest.skip(reason)
    case = Case(name="t", model="llama", size="tiny", peers=("eager", LIGER.name))
    eager, liger = run_case(case, device="cpu", repeats=1, seed=0, say=lambda line: None)
    assert (eager.status, liger.status) == ("ok", "ok"), liger.error
    assert liger.gradient_error is not None
    assert liger.gradient_error < 1e-4
    assert liger.peak_bytes
    assert eager.step_seconds
    assert liger.step_seconds is liger.cpu_seconds is liger.first_step_seconds is None
