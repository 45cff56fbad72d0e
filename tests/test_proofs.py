"""A warm start knows what the first process found: the bound, the gap, what the ledger needs."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

import memopt.backend
import memopt.memory.certify
from memopt._torch import dynamo_counters
from memopt.memory.certify import Certificate
from memopt.memory.timeline import LiveRange, Step, Timeline
from memopt.proofs import Proof, recall, remember

TIMELINE = Timeline(
    "plan",
    (Step("kernel", "model.py:3", backward=True),),
    (LiveRange(name="buf0", nbytes=8, first=0, last=0, role="saved"),),
)
PROOF = Proof(Certificate(1000, 300, TIMELINE), limit_bytes=900, planned_peak_bytes=880)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A compile cache of the test's own."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    return tmp_path / "memopt"


def test_a_proof_is_found_under_its_key_and_code_only(cache: Path) -> None:
    remember("key", ["forward", "backward"], PROOF)
    assert recall("key", ["forward", "backward"]) == PROOF
    assert recall("other", ["forward", "backward"]) is None
    assert recall("key", ["forward", "other"]) is None


def test_a_broken_file_is_no_proof(cache: Path) -> None:
    remember("key", ["code"], PROOF)
    (file,) = cache.iterdir()
    for content in (b"", b"junk", b"[]", b"{}", file.read_bytes()[:-9]):
        file.write_bytes(content)
        assert recall("key", ["code"]) is None


def test_what_does_not_fit_is_planned_again_for_its_error(cache: Path) -> None:
    remember("key", ["code"], dataclasses.replace(PROOF, fits=False))
    assert recall("key", ["code"]) is None


def test_a_disabled_cache_keeps_nothing(cache: Path) -> None:
    with torch._inductor.config.patch(force_disable_caches=True):
        remember("key", ["code"], PROOF)
    assert not cache.exists()


def test_the_next_margin_is_the_gap_or_visibly_more_where_that_was_allowed_for() -> None:
    assert PROOF.overshoot_bytes == 100
    assert PROOF.next_margin_bytes(0) == 120 + 120 // 64
    assert PROOF.next_margin_bytes(120) == 120 + 100 + 900 // 64


def test_what_the_others_hold_is_in_the_peak_of_the_code() -> None:
    proof = dataclasses.replace(PROOF, others=2, saved_bytes=300, output_bytes=50)
    assert proof.emitted_peak_bytes == 1000 + 2 * 350
    assert proof.overshoot_bytes == 800


def test_nothing_is_known_to_be_over_without_a_bound_or_a_certificate() -> None:
    assert dataclasses.replace(PROOF, limit_bytes=None).overshoot_bytes == 0
    assert dataclasses.replace(PROOF, certificate="it reads a value").overshoot_bytes == 0


def function(x: torch.Tensor) -> torch.Tensor:
    for _ in range(6):
        x = (x @ x).sigmoid()
    return x.sum()


def run(budget: Any) -> torch.Tensor:
    """One step in a compiler that has forgotten everything but its files."""
    torch._dynamo.reset()
    x = (torch.arange(4096.0).reshape(64, 64) / 4096).requires_grad_()
    compiled = torch.compile(function, backend="memopt", options={"memory_budget": budget})
    (gradient,) = torch.autograd.grad(compiled(x), x)
    return gradient


def hits() -> int:
    return int(dynamo_counters["aot_autograd"]["autograd_cache_hit"])


@pytest.mark.parametrize("budget", [0.8, 140_000])
def test_a_warm_start_recalls_and_plans_again_where_the_proof_is_lost(
    budget: Any, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept: list[tuple[int, int, int]] = []

    class Ledger:
        def held_bytes(self) -> int:
            return 0

        def earlier_peak_bytes(self, gradient_bytes: int) -> int:
            return 0

        def tracked(
            self, compiled: Any, held_bytes: int, most: int, peak_bytes: int, _: Any
        ) -> Any:
            kept.append((held_bytes, most, peak_bytes))
            return compiled

    monkeypatch.setattr(memopt.backend, "LEDGER", Ledger())
    replays: list[int] = []
    replay = memopt.memory.certify.certify

    def counted(codes: Any, **options: Any) -> Any:
        replays.append(len(codes))
        return replay(codes, **options)

    monkeypatch.setattr(memopt.backend, "certify", counted)
    cold = run(budget)
    first = hits()
    proven = len(replays)
    assert proven >= 1
    assert torch.equal(run(budget), cold)
    assert hits() > first
    assert len(replays) == proven
    for file in cache.iterdir():
        file.unlink()
    assert torch.equal(run(budget), cold)
    assert len(replays) > proven
    assert len(set(kept)) == (budget != 0.8)  # the ledger learns the same every time


def test_a_bound_that_the_first_attempt_broke_is_kept_on_a_warm_start_too(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first attempt's code is in the cache as well, and must not be taken for the answer."""
    seen: list[Proof] = []
    of = Proof.of

    def misjudged(split: Any, certificate: Any) -> Proof:
        """As if the first attempt had come out over the bound."""
        proof = of(split, certificate)
        if split.margin_bytes is None and proof.emitted is not None:
            worse = dataclasses.replace(proof.emitted, peak_bytes=(proof.limit_bytes or 0) + 64)
            proof = dataclasses.replace(proof, certificate=worse)
        seen.append(proof)
        return proof

    monkeypatch.setattr(Proof, "of", misjudged)
    run(0.8)
    assert [p.overshoot_bytes > 0 for p in seen] == [True, False]
    first = hits()
    run(0.8)
    assert hits() == first + 2
    assert len(seen) == 2  # both attempts came from the cache, in the same order
