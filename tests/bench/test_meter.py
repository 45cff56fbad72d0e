import gc

import pytest
import torch

from bench.meter import Meter

KIB = 1024


def test_peak_and_end_are_exact_for_known_tensors() -> None:
    with Meter() as meter:
        kept = torch.empty(64 * KIB, dtype=torch.uint8)
        passing = torch.empty(192 * KIB, dtype=torch.uint8)
        del passing
        also_kept = torch.empty(32 * KIB, dtype=torch.uint8)
    assert meter.peak_bytes == (64 + 192) * KIB
    assert meter.end_bytes == (64 + 32) * KIB
    assert meter.reserved_bytes is None
    del kept, also_kept


def test_bytes_are_counted_above_those_on_entry() -> None:
    before = torch.empty(512 * KIB, dtype=torch.uint8)
    with Meter() as meter:
        after = torch.empty(128 * KIB, dtype=torch.uint8)
    assert meter.peak_bytes == 128 * KIB
    del before, after


def test_releases_of_what_was_there_before_are_not_counted() -> None:
    with Meter():
        tensors = [torch.empty(512 * KIB, dtype=torch.uint8)]
    with Meter() as meter:
        tensors.clear()
        gc.collect()
        tensors.append(torch.empty(128 * KIB, dtype=torch.uint8))
    assert meter.peak_bytes == 128 * KIB
    assert meter.end_bytes == 128 * KIB


def test_the_backward_is_counted_with_its_gradients() -> None:
    weight = torch.nn.Parameter(torch.ones(256, 256))
    nbytes = weight.untyped_storage().nbytes()
    with Meter() as meter:
        torch.autograd.backward(weight.sin().sum())
    assert meter.end_bytes == nbytes
    assert 2 * nbytes <= meter.peak_bytes < 4 * nbytes


def test_an_exception_passes_through() -> None:
    with pytest.raises(ZeroDivisionError), Meter() as meter:  # noqa: PT012
        torch.empty(KIB, dtype=torch.uint8)
        _ = 1 // 0
    assert meter.peak_bytes == KIB
    with Meter() as again:
        pass
    assert again.peak_bytes == 0


@pytest.mark.gpu
def test_cuda_reads_the_allocator() -> None:
    with Meter("cuda") as meter:
        kept = torch.empty(4 * KIB * KIB, dtype=torch.uint8, device="cuda")
        del kept
    assert meter.peak_bytes == 4 * KIB * KIB
    assert meter.end_bytes == 0
    assert meter.reserved_bytes is not None
    assert meter.reserved_bytes >= 4 * KIB * KIB
