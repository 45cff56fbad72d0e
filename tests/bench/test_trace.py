"""The trace finds what is wrong, and counts bytes as one would by hand."""

import pytest
import torch

pytest.importorskip("triton")

from bench.triton.interpreter import install
from bench.triton.mode import interpreting
from bench.triton.trace import OutOfBoundsError, trace
from tests.bench import sample_kernels as kernels

install()


def test_a_clean_kernel_moves_each_byte_once_and_has_no_conflicts() -> None:
    x, out = torch.randn(4096), torch.empty(4096)
    with trace() as launches:
        kernels.copy[(4,)](x, out, 4096, 0, BLOCK=1024)
    (launch,) = launches
    assert (launch.name, launch.programs, launch.conflicts) == ("copy", 4, [])
    assert launch.requested_bytes == launch.l2_bytes == launch.dram_bytes == 2 * 4096 * 4
    assert launch.coalescing == 1


def test_sectors_that_two_programs_read_come_from_memory_once() -> None:
    x, out = torch.randn(1), torch.empty(64)
    with trace() as launches:
        kernels.add[(64,)](x, out, 1, ADDED=0)
    (launch,) = launches
    assert launch.requested_bytes == 2 * 64 * 4
    assert launch.l2_bytes == 2 * 64 * 32
    assert launch.dram_bytes == 32 + 64 * 4 + (32 if out.data_ptr() % 32 else 0)


@pytest.mark.parametrize(("shift", "beyond"), [(1, 1), (-1, 1), (7, 7)])
def test_a_read_outside_an_argument_says_where(shift: int, beyond: int) -> None:
    x, out = torch.randn(64), torch.empty(64)
    with trace(), pytest.raises(Exception, match="outside every argument") as caught:
        kernels.copy[(1,)](x, out, 64, shift, BLOCK=64)
    assert isinstance(caught.value.__cause__, OutOfBoundsError)
    assert f"load of 4 bytes in {beyond} lanes" in str(caught.value)


def test_the_end_of_a_view_is_the_end_of_the_argument() -> None:
    x, out = torch.randn(128)[:64], torch.empty(64)
    with trace(), pytest.raises(Exception, match="outside every argument"):
        kernels.copy[(1,)](x, out, 64, 1, BLOCK=64)


def test_programs_that_write_one_place_race() -> None:
    x = torch.empty(1)
    with trace() as launches:
        kernels.one_element[(2,)](x, BLOCK=1)
    assert [(c.kind, c.programs) for c in launches[0].conflicts] == [("race", (0, 1))]


@pytest.mark.parametrize("shift", [0, 1, -64])
@pytest.mark.parametrize("order", [None, 0, 1, 2])
def test_a_program_that_reads_what_another_one_writes_is_a_race_in_any_order(
    shift: int, order: int | None
) -> None:
    x = torch.randn(64 * 6)
    with trace() as launches, interpreting(order=order):
        kernels.copy[(4,)](x[64:-64], x[64:-64], 255 if shift > 0 else 256, 0, BLOCK=64)
        kernels.copy[(4,)](x, x[64:-64], 256, 64 + shift, BLOCK=64)
    assert launches[0].conflicts == []
    assert {c.kind for c in launches[1].conflicts} == ({"race"} if shift else set())


def test_a_lane_that_overwrites_another_one_is_seen() -> None:
    with trace() as launches:
        kernels.one_element[(1,)](torch.empty(1), BLOCK=4)
    assert [c.kind for c in launches[0].conflicts] == ["twice"]


@pytest.mark.parametrize("barrier", [False, True])
def test_a_program_that_reads_what_it_wrote_needs_a_barrier(barrier: bool) -> None:
    x = torch.empty(64)
    with trace() as launches:
        kernels.write_then_read[(1,)](x, BLOCK=32, BARRIER=barrier)
    assert [c.kind for c in launches[0].conflicts] == ([] if barrier else ["unordered"])
