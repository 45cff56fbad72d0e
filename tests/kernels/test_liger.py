"""No operator moves more bytes than liger's kernels, and it moves fewer where they are several."""

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch

pytest.importorskip("triton")
pytest.importorskip("liger_kernel")

from bench.kernels import liger_peer, moved_bytes, variants
from bench.liger_fused import FUSED, Composition
from bench.liger_kernels import LIGER
from bench.triton.interpreter import install
from memopt.kernels import specs, triton_norm, triton_rows
from memopt.kernels.rows import IndexTargets
from memopt.kernels.spec import Arguments, KernelSpec

install()


def few_rows(spec: KernelSpec) -> KernelSpec:
    """With samples that do not take long, one row after another; those of large ones say how."""
    large: Any = spec.large
    return spec if large is None else replace(spec, samples=partial(large, rows=128))


SPECS = {spec.name: few_rows(spec) for spec in specs()}
# Of a dropout the numbers are drawn.
COMPARED = [name for name in FUSED if name != "memopt::dropout_bits"]


def peers(name: str, dtype: torch.dtype) -> Iterator[tuple[Arguments, Composition]]:
    """All arguments that liger's kernels take, with what takes them."""
    for arguments in variants(SPECS[name], dtype):
        peer = liger_peer(SPECS[name], arguments, "cpu")
        if isinstance(peer, Composition):
            yield arguments, peer


@pytest.mark.parametrize("name", FUSED)
def test_it_moves_no_more_bytes_than_liger(name: str) -> None:
    forms = set()
    for number, (arguments, peer) in enumerate(peers(name, torch.bfloat16)):
        mine = moved_bytes(partial(SPECS[name].launch, *arguments))["dram_bytes"]
        theirs = moved_bytes(peer.run)["dram_bytes"]
        assert 0 < mine <= theirs, f"{number}: {peer.words}"
        assert mine < theirs or not peer.words, f"{number}: {peer.words}"
        forms.add(peer.words)
    assert ("" in forms) == (name in LIGER)
    assert forms - {""}


@pytest.mark.parametrize("name", COMPARED)
def test_liger_computes_the_same(name: str) -> None:
    """Where it is one kernel, and where it is several."""
    forms = {peer.words: (arguments, peer) for arguments, peer in peers(name, torch.float32)}
    for arguments, peer in forms.values():
        mine, theirs = SPECS[name].plain(*arguments), peer.run()
        if name in ("memopt::norm", "memopt::norm_backward") and not peer.words:
            theirs = [theirs[0]]  # the others are what its autograd saves
        else:
            assert len(theirs) in (len(mine), sum(t.numel() > 0 for t in mine))
        for own, other in zip(mine, theirs, strict=False):
            of_rows = name == "memopt::norm_backward" and own.dim() == 1  # in another order
            if own.numel() and not of_rows:
                torch.testing.assert_close(other.view_as(own), own)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_a_gpus_programs_write_no_more_sums_than_liger(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    """Liger has one program for each processor, of which each writes a row that a sum reads."""
    processors, rows, width = 4, 256, 512
    monkeypatch.setattr(triton_norm, "processors", lambda x: processors)
    x, dy = torch.randn(2, rows, width).to(dtype)
    weight = torch.randn(width).to(dtype)
    (rstd,) = torch.rand(1, rows)
    arguments = dy, None, x, weight, None, torch.empty(0), rstd, 0.0, [True, False], False
    peer = liger_peer(SPECS["memopt::norm_backward"], arguments, "cpu")
    assert isinstance(peer, Composition)
    of_one = moved_bytes(peer.run)["dram_bytes"]
    theirs = of_one + 2 * (processors - 1) * width * torch.float32.itemsize
    mine = moved_bytes(lambda: triton_norm.backward(*arguments))["dram_bytes"]
    assert of_one < mine <= theirs


@pytest.mark.parametrize("softcap", [0.0, 30.0])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_rows_of_a_cross_entropy_move_no_more_bytes_than_in_liger(
    dtype: torch.dtype, softcap: float
) -> None:
    """Both write the gradient over the logits; this kernel is no operator of its own."""
    from liger_kernel.ops.cross_entropy import cross_entropy_forward

    logits, target = torch.randn(32, 2048).to(dtype), torch.randint(2048, (32,))
    loss, upstream = IndexTargets(target, None, 0.0), torch.ones(32)
    given, copy = logits.clone().requires_grad_(), logits.clone()

    def liger() -> None:
        cross_entropy_forward(
            given, target, None, -100, 0.0, 0.0, "none", softcap or None, return_z_loss=False
        )

    theirs = moved_bytes(liger)["dram_bytes"]
    mine = moved_bytes(lambda: triton_rows.run(copy, loss, 1.0, softcap, upstream, None))
    assert 0 < mine["dram_bytes"] <= theirs
    assert not torch.equal(copy, logits)
    torch.testing.assert_close(copy, given.detach())
