"""Private names of torch that memopt stands on: present, and of the shape that is relied upon."""

import inspect
import os
import subprocess
import sys

import torch

from memopt import _torch


def test_every_name_that_is_exported_exists() -> None:
    assert [name for name in _torch.__all__ if not hasattr(_torch, name)] == []


def test_the_extraction_takes_the_arguments_that_the_partition_passes() -> None:
    parameters = inspect.signature(_torch.extract_forward_and_backward).parameters
    assert {"saved_sym_nodes", "num_fwd_outputs", "static_lifetime_input_nodes"} <= set(parameters)


def test_listeners_of_emitted_code_are_stacked_and_taken_off_again() -> None:
    seen: list[str] = []
    with _torch.capture_output_code(seen.append), _torch.capture_output_code(seen.append):
        emit = _torch.GraphLowering.save_output_code
        assert emit is not None
        emit("code")
    assert seen == ["code", "code"]
    assert _torch.GraphLowering.save_output_code is None


def test_reading_a_symbolic_size_adds_no_guard() -> None:
    sizes: list[object] = []

    def note(gm: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> object:
        for value in inputs:
            if isinstance(value, torch.SymInt):
                sizes.extend([_torch.size_hint(value), str(_torch.size_expr(value))])
        return gm.forward

    compiled = torch.compile(lambda x: x * 2, backend=note, dynamic=True)
    compiled(torch.ones(6))
    compiled(torch.ones(9))
    assert sizes[0] == 6
    assert not str(sizes[1]).isdigit()
    assert len(sizes) == 2  # the second length did not compile again


_WITHOUT = """
import torch
torch.distributed.is_available = lambda: False
from memopt._torch import DTensor
assert "torch.distributed" not in DTensor.__module__
x = torch.randn(4, 8, requires_grad=True)
def loss(x, w):
    return torch.nn.functional.cross_entropy(x @ w, torch.arange(4))
w = torch.randn(8, 16)
options = {"lowering": "eager", "strict": True, "memory_budget": "min"}
torch.compile(loss, backend="memopt", options=options)(x, w).backward()
torch.testing.assert_close(x.grad, torch.autograd.grad(loss(x, w), x)[0])
"""


def test_a_build_without_torch_distributed_will_do() -> None:
    done = subprocess.run(
        [sys.executable, "-c", _WITHOUT], capture_output=True, text=True, check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
