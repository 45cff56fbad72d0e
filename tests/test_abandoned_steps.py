"""A step that ends early leaves nothing behind, on the device or on the host."""

import gc
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import memopt
from bench.meter import Meter
from memopt.kernels.host import ARENA
from tests.training import gradients, train_step

OPTIONS: dict[str, Any] = {
    "memory_budget": 0.6,
    "passes": {"offload": {"simulate": True, "least": 1024, "bandwidth": 1e12}},
}


Trained = tuple[Any, nn.Module, dict[str, Tensor]]


class StopError(RuntimeError):
    """Raised in the middle of a step."""


class Deep(nn.Module):
    """Layers whose products take longer to make again than their results take to copy."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(256, 256) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = nn.functional.gelu(layer(x))
        return x.square().mean()


def make() -> tuple[Deep, dict[str, Tensor]]:
    torch.manual_seed(0)
    return Deep(), {"x": torch.randn(1024, 256)}


@pytest.fixture(params=["eager", "inductor"])
def trained(request: pytest.FixtureRequest) -> Trained:
    """A compiled model that has values on the host in its steps, after two of them."""
    model, inputs = make()
    compiled = torch.compile(
        model, backend="memopt", options={**OPTIONS, "lowering": request.param}
    )
    for _ in range(2):
        ARENA.peak_bytes = 0
        train_step(compiled, model, inputs)
    assert ARENA.peak_bytes > 0
    assert ARENA.held_bytes == 0
    return compiled, model, inputs


def assert_nothing_is_left(trained: Trained, held: int) -> None:
    """Nothing beyond what is held, and the next step is that of eager."""
    compiled, model, inputs = trained
    gc.collect()
    assert held <= 0
    assert ARENA.held_bytes == 0
    loss = train_step(compiled, model, inputs)
    mine = gradients(model)
    torch.testing.assert_close(loss, train_step(model, model, inputs))
    torch.testing.assert_close(mine, gradients(model))
    assert ARENA.held_bytes == 0


def bytes_left_by(run: Any, model: nn.Module) -> int:
    """What the allocator still has after something was run, gradients left out."""
    model.zero_grad(set_to_none=True)
    gc.collect()
    with Meter("cpu") as meter:
        run()
        model.zero_grad(set_to_none=True)
        gc.collect()
    return meter.end_bytes


def test_an_exception_in_the_backward(trained: Trained) -> None:
    compiled, model, inputs = trained

    def stop(gradient: Tensor) -> None:
        raise StopError

    def run() -> None:
        loss = compiled(**inputs)
        loss.register_hook(stop)
        with pytest.raises(StopError):
            loss.backward()

    assert_nothing_is_left(trained, bytes_left_by(run, model))


def test_an_abandoned_backward(trained: Trained) -> None:
    compiled, model, inputs = trained

    def run() -> None:
        loss = compiled(**inputs)
        assert ARENA.held_bytes > 0
        del loss

    assert_nothing_is_left(trained, bytes_left_by(run, model))


def test_the_host_has_no_memory_for_the_second_copy(
    trained: Trained, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled, model, inputs = trained
    allocate = ARENA.empty_like
    copies: list[torch.Size] = []

    def once(x: Tensor) -> Tensor:
        if copies:
            raise memopt.HostMemoryError
        copies.append(x.shape)
        return allocate(x)

    def run() -> None:
        with monkeypatch.context() as patch:
            patch.setattr(ARENA, "empty_like", once)
            with pytest.raises(memopt.HostMemoryError):
                train_step(compiled, model, inputs)

    assert_nothing_is_left(trained, bytes_left_by(run, model))


def test_the_device_has_no_memory_for_a_copy_back(
    trained: Trained, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled, model, inputs = trained

    def refuse(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError

    def run() -> None:
        loss = compiled(**inputs)
        with monkeypatch.context() as patch:
            patch.setattr(torch, "empty_strided", refuse)
            with pytest.raises(torch.OutOfMemoryError):
                loss.backward()

    assert_nothing_is_left(trained, bytes_left_by(run, model))


CHILD = """
import sys, torch
from tests.test_abandoned_steps import OPTIONS, make
from tests.training import train_step
model, inputs = make()
compiled = torch.compile(model, backend="memopt", options=OPTIONS)
print("started", flush=True)
loss = train_step(compiled, model, inputs)
print("stepped", float(loss), flush=True)
while len(sys.argv) > 1:
    train_step(compiled, model, inputs)
"""


def in_shared_memory() -> set[str]:
    """What lies there, but for the semaphores of other tests' processes that come and go."""
    return {name for name in os.listdir("/dev/shm") if not name.startswith("sem.")}


@pytest.mark.parametrize("line", ["started", "stepped"])
def test_a_killed_process_leaves_no_files_and_a_cache_that_works(
    tmp_path: Path, line: str
) -> None:
    """Killed while it compiles, and while it steps."""
    temporary, cache = tmp_path / "temporary", tmp_path / "cache"
    temporary.mkdir()
    environment = os.environ | {"TMPDIR": str(temporary), "TORCHINDUCTOR_CACHE_DIR": str(cache)}
    shared = in_shared_memory()
    command = [sys.executable, "-c", CHILD]
    options: Any = {"env": environment, "text": True, "stdout": subprocess.PIPE}
    with subprocess.Popen([*command, "forever"], **options) as child:
        for said in child.stdout or ():
            if said.startswith(line):
                break
        time.sleep(1.0)
        child.send_signal(signal.SIGKILL)
    # Torch keeps the compiler's headers there, for all processes.
    left = [path for path in temporary.rglob("*") if "precompiled_headers" not in path.parts]
    assert not any(path.is_file() and path.stat().st_size for path in left)
    assert in_shared_memory() <= shared
    after = subprocess.run(command, env=environment, text=True, capture_output=True, check=True)
    model, inputs = make()
    expected = float(train_step(model, model, inputs))
    assert float(after.stdout.split()[-1]) == pytest.approx(expected, rel=1e-5)
