"""Files that values lie in: what is in them, what is left behind, and what errors say."""

import errno
import os
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import memopt
from memopt.errors import ConfigError, HostMemoryError
from memopt.kernels import files
from memopt.kernels.arena import Arena
from memopt.kernels.files import Files, file_bandwidth


class Done:
    """Stands in for an event on a GPU."""

    def __init__(self, happened: threading.Event | None = None) -> None:
        self._happened = happened

    def synchronize(self) -> None:
        """Wait for it."""
        if self._happened:
            assert self._happened.wait(10)


def done() -> Any:
    """An event that has happened."""
    return Done()


@pytest.fixture
def without_gpu(monkeypatch: pytest.MonkeyPatch) -> list[threading.Event]:
    """Copies to and from pinned memory as plain ones; what each waits for, where it is listed."""
    held_up: list[threading.Event] = []

    def out(x: Tensor) -> tuple[Tensor, Any]:
        return x.clone(), Done(held_up.pop(0) if held_up else None)

    def back(kept: Tensor, x: Tensor, free: Any) -> Any:
        x.copy_(kept)
        return free

    monkeypatch.setattr(files, "copied_out", out)
    monkeypatch.setattr(files, "copied_back", back)
    monkeypatch.setattr(files, "pinned_like", torch.empty_like)
    return held_up


def test_values_come_back_as_they_were_though_the_disk_is_late(
    tmp_path: Path, without_gpu: list[threading.Event]
) -> None:
    late = threading.Event()
    without_gpu.append(late)
    there = Files(str(tmp_path))
    x, y = torch.randn(64, 8), torch.randn(8, 4).t()
    kept, _ = there.put(x)
    other, _ = there.put(y)
    back, again = torch.empty_like(x), torch.empty_strided(y.shape, y.stride())
    first = there.take(kept, back, done())
    second = there.take(other, again, done())
    assert not first.done()
    late.set()
    for event in (first, second):
        event.result(10)
    torch.testing.assert_close(back, x, rtol=0, atol=0)
    torch.testing.assert_close(again, y, rtol=0, atol=0)


def test_a_value_may_be_read_twice(tmp_path: Path, without_gpu: list[threading.Event]) -> None:
    there = Files(str(tmp_path))
    x = torch.randn(16)
    kept, _ = there.put(x)
    for _ in range(2):
        back = torch.empty_like(x)
        there.take(kept, back, done()).result(10)
        torch.testing.assert_close(back, x, rtol=0, atol=0)


def test_no_more_than_two_blocks_wait_for_the_disk(
    tmp_path: Path, without_gpu: list[threading.Event]
) -> None:
    late = threading.Event()
    without_gpu.append(late)
    there = Files(str(tmp_path))
    kept = [there.put(torch.zeros(4))[0] for _ in range(2)]
    third = threading.Thread(target=lambda: kept.append(there.put(torch.zeros(4))[0]))
    third.start()
    third.join(0.2)
    assert third.is_alive()
    late.set()
    third.join(10)
    assert len(kept) == 3


def test_what_goes_wrong_beside_the_step_is_raised_in_it(
    tmp_path: Path, without_gpu: list[threading.Event], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(kept: Tensor) -> Tensor:
        raise HostMemoryError("nothing more to pin")

    monkeypatch.setattr(files, "pinned_like", fails)
    there = Files(str(tmp_path))
    kept, _ = there.put(torch.zeros(4))
    with pytest.raises(HostMemoryError, match="nothing more"):
        there.take(kept, torch.zeros(4), done()).result(10)


def test_files_have_no_name_and_are_used_again(tmp_path: Path) -> None:
    arena = Arena(str(tmp_path))
    first = arena.empty_like(torch.zeros(100))
    at = first.data_ptr()
    assert list(tmp_path.iterdir()) == []  # nothing is left, however the process ends
    assert arena.held_bytes == 400
    del first
    assert arena.held_bytes == 0
    assert arena.empty_like(torch.zeros(50, 2)).data_ptr() == at


def test_a_full_disk_is_an_error_with_the_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    arena = Arena(str(tmp_path))
    with pytest.raises(HostMemoryError, match=r"No space left.*file_bytes.*another directory"):
        arena.empty_like(torch.zeros(100))
    assert arena.held_bytes == 0


@pytest.mark.parametrize(
    ("directory", "allowed"),
    [("", "local disk"), ("/no/such/place", "local disk"), (7, "a string")],
)
def test_without_a_directory_there_is_an_error(directory: object, allowed: str) -> None:
    with pytest.raises(
        ConfigError, match=f"'directory' of pass 'offload_to_files' = .*allowed is .*{allowed}"
    ):
        memopt.explain(
            nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 1)),
            torch.ones(2, 4),
            options={
                "memory_budget": 0.9,
                "passes": {"offload_to_files": {"directory": directory}},
            },
        )


def test_a_bandwidth_is_measured(tmp_path: Path) -> None:
    assert 1e6 < file_bandwidth(str(tmp_path), 2**22) < 1e12


@pytest.mark.gpu
def test_on_a_gpu_values_come_back_as_they_were(tmp_path: Path) -> None:
    xs = [torch.randn(1 << 20, device="cuda") for _ in range(6)]
    want = [x.cpu() for x in xs]
    kept = [torch.ops.memopt.to_host(x, str(tmp_path)) for x in xs]
    for x in xs:
        torch.ops.memopt.left_(x)
        x.zero_()
    for k, w in zip(reversed(kept), reversed(want), strict=True):
        back = torch.ops.memopt.from_host(k, torch.device("cuda"), str(tmp_path))
        torch.ops.memopt.arrived_(back)
        torch.testing.assert_close(back.cpu(), w, rtol=0, atol=0)
