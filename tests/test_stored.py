"""Caches that were cut off, edited or shared by processes: what is not whole is made again."""

import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from memopt.kernels.measured import fastest
from memopt.stored import keep, kept
from tests.test_packaging import ROOT

BODY = {"a": [1, 2.5, None], "b": {"c": "d"}}


def test_a_cache_gives_back_what_it_was_given_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "made" / "entry.json"
    assert kept(path) is None
    keep(path, BODY)
    assert kept(path) == BODY
    whole = path.read_bytes()
    for at in range(len(whole)):
        path.write_bytes(whole[:at])
        assert kept(path) is None
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        assert kept(path) in (None, BODY)  # in white space nothing changes
    for other in (b"[]", b"3", b"null", b"{}", b'{"hash": 1}', b"[" * 10**6, b"\xff"):
        path.write_bytes(other)
        assert kept(path) is None


def test_a_cache_that_cannot_be_written_keeps_nothing(tmp_path: Path) -> None:
    path = tmp_path / "entry.json"
    path.mkdir()
    keep(path, BODY)
    assert kept(path) is None
    keep(tmp_path / "entry.json" / "a" / "b.json", BODY)
    (tmp_path / "file").touch()
    keep(tmp_path / "file" / "entry.json", BODY)
    assert kept(tmp_path / "file" / "entry.json") is None


def test_times_that_were_edited_are_measured_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    measured: list[str] = []

    def way(name: str, seconds: float) -> Callable[[], float]:
        def run() -> float:
            measured.append(name)
            return seconds

        return run

    ways: Mapping[str, Any] = {"slow": way("slow", 2.0), "fast": way("fast", 1.0)}
    assert fastest(("a question",), ways, torch.device("cpu")) == "fast"
    assert fastest(("a question",), ways, torch.device("cpu")) == "fast"
    assert measured == ["slow", "fast"]
    (path,) = (tmp_path / "memopt").iterdir()
    path.write_text('{"slow": NaN, "fast": "1"}')
    assert fastest(("a question",), ways, torch.device("cpu")) == "fast"
    assert measured == ["slow", "fast"] * 2


_WRITES = """
import sys
from pathlib import Path
from memopt.stored import keep, kept
path = Path(sys.argv[1])
for i in range(10**9):
    keep(path, {"number": i, "numbers": [i] * 20_000})
    body = kept(path)
    assert body is not None and set(body["numbers"]) == {body["number"]}
    if not i:
        print("ready", flush=True)
"""


def test_processes_share_a_cache_and_one_that_is_killed_leaves_it_whole(tmp_path: Path) -> None:
    path = tmp_path / "entry.json"
    writers = [
        subprocess.Popen(
            [sys.executable, "-c", _WRITES, str(path)],
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )
        for _ in range(2)
    ]
    for writer in writers:
        assert writer.stdout is not None
        assert writer.stdout.readline() == "ready\n"  # its own first reading was right
    for writer in writers:
        for _ in range(20):
            body = kept(path)
            assert body is not None
            assert set(body["numbers"]) == {body["number"]}
        writer.kill()
        writer.wait()
        writer.stdout.close()  # type: ignore[union-attr]
        body = kept(path)
        assert body is not None
        assert set(body["numbers"]) == {body["number"]}


_COMPILES = """
import torch
import memopt
from tests.graphs import gradients

def function(x, w):
    h = torch.nn.functional.dropout((x @ x).tanh(), 0.0)
    return (torch.nn.functional.cross_entropy(h @ w.t(), torch.arange(16)),)

torch.manual_seed(0)
x = torch.randn(16, 16, requires_grad=True)
w = torch.randn(300, 16, requires_grad=True)
for budget in (None, "min"):
    options = {"memory_budget": budget, "strict": True}
    compiled = torch.compile(function, backend="memopt", options=options)
    for mine, plain in zip(gradients(compiled(x, w), [x, w]), gradients(function(x, w), [x, w])):
        torch.testing.assert_close(mine, plain, rtol=1e-4, atol=1e-5)
print("right")
"""


@pytest.mark.slow
def test_two_processes_compile_into_one_cache_at_once(tmp_path: Path) -> None:
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "TORCHINDUCTOR_CACHE_DIR": str(tmp_path),
    }

    def started() -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-c", _COMPILES],
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
            cwd=ROOT,
        )

    first, second = started(), started()
    assert first.communicate()[0] == "right\n"
    assert second.communicate()[0] == "right\n"
    entries = list((tmp_path / "memopt").iterdir())
    assert entries
    assert all(kept(entry) is not None for entry in entries)
    for entry in entries:
        entry.write_bytes(entry.read_bytes()[:100])  # as if a process had died there
    killed = started()
    with pytest.raises(subprocess.TimeoutExpired):
        killed.communicate(timeout=4)
    killed.kill()
    killed.communicate()
    assert started().communicate()[0] == "right\n"
    assert all(kept(entry) is not None for entry in entries)
