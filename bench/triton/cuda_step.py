"""Training steps of small models, compiled by memopt for CUDA, and what is wrong with them."""

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from bench.triton import fake_cuda
from bench.triton.gate import numbers
from bench.triton.interpreter import install
from bench.triton.on_cpu import Twins, modules_on_cpu
from bench.zoo import Inputs, LossOnly
from bench.zoo.hugging_face import llama
from memopt.kernels.chunks import has_row_kernel
from memopt.kernels.norm import NORM
from memopt.kernels.rows import IndexTargets

# Losses are compared over several inputs at once: eager hits a single number by luck.
_DRAWS = 3
_OPTIONS: dict[str, Any] = {
    "strict": True,
    # Without a name they are chosen by measurement, and there may be no GPU to measure on.
    "passes": {
        "chunk_losses": {"chunk_rows": 16},
        **dict.fromkeys(("fuse_rotary", "fuse_norms", "fuse_gates"), True),
    },
}
Results = tuple[Tensor, Tensor]
"""The losses of all inputs `(D,)`, and all gradients `(D, P)` in the order of the parameters."""


class NormHead(nn.Module):
    """A linear layer added to its input, the sum's norm, a head and its loss."""

    def __init__(self, width: int, classes: int) -> None:
        super().__init__()
        self.inner = nn.Linear(width, width, bias=False)
        self.weight = nn.Parameter(torch.rand(width) + 0.5)
        self.head = nn.Linear(width, classes, bias=False)

    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        arguments = (self.inner(x), x, self.weight, None, 1e-6, 0.0, False)
        y, total, *_ = NORM(*arguments)
        return F.cross_entropy(self.head(y + total), target)


def _norm_head(dtype: torch.dtype) -> tuple[nn.Module, list[Inputs]]:
    model = NormHead(64, 512)
    draws: list[Inputs] = [
        {"x": torch.randn(40, 64).to(dtype), "target": torch.randint(512, (40,))}
        for _ in range(_DRAWS)
    ]
    return model, draws


def _llama(dtype: torch.dtype) -> tuple[nn.Module, list[Inputs]]:
    """Two layers. What it computes in float32 in every dtype is exact next to bfloat16."""
    recipe = llama(2, 512, 64, 128, 4, 2, batch=1, length=24, attn_implementation="eager")
    return LossOnly(recipe.build()), [recipe.inputs(seed) for seed in range(_DRAWS)]


MODELS: Mapping[str, Callable[[torch.dtype], tuple[nn.Module, list[Inputs]]]] = {
    "norm_head": _norm_head,
    "llama": _llama,
}


def report(name: str, dtype_name: str, budget: str | None, device: str) -> dict[str, Any]:
    """What is wrong with the numbers of a step, and which kernels it launches.

    Args:
        name: of the model.
        dtype_name: of its parameters: ``"bfloat16"``.
        budget: memopt's ``memory_budget``, if there is one.
        device: ``"cuda"`` for a GPU; ``"cpu"`` for interpreted kernels, after
            `bench.triton.fake_cuda.preload`.
    """
    dtype = getattr(torch, dtype_name)
    torch.manual_seed(0)
    model, draws = MODELS[name](dtype)
    model = model.to(dtype)
    wide = [{k: _wide(t) for k, t in inputs.items()} for inputs in draws]
    exact = _eager(copy.deepcopy(model).double(), wide)
    plain = _eager(copy.deepcopy(model).to(device), _on(device, draws))
    options = {**_OPTIONS, "memory_budget": budget}
    compiled, launches = (_on_gpu if device == "cuda" else _interpreted)(model, draws, options)
    return {
        "device": device,
        "problems": numbers(compiled, exact, plain),
        "launches": launches,
    }


def _wide(t: Tensor) -> Tensor:
    return t.double() if t.is_floating_point() else t


def _stacked(steps: Sequence[tuple[Tensor, Sequence[Tensor]]]) -> Results:
    losses, gradients = zip(*steps, strict=True)
    flat = [torch.cat([g.flatten() for g in each]) for each in gradients]
    return torch.stack([loss.detach() for loss in losses]).cpu(), torch.stack(flat).cpu()


def _step(
    run: Callable[..., Tensor],
    model: nn.Module,
    inputs: Inputs,
    ones: Mapping[torch.dtype, Tensor] | None = None,
) -> tuple[Tensor, Sequence[Tensor]]:
    """Loss and gradients; the loss's own is taken from `ones`, if it is given."""
    loss = run(**inputs)
    upstream = None if ones is None else ones[loss.dtype]
    return loss, torch.autograd.grad(loss, [*model.parameters()], upstream)


def _eager(model: nn.Module, draws: Sequence[Inputs]) -> Results:
    return _stacked([_step(model, model, inputs) for inputs in draws])


def _on(device: str, draws: Sequence[Inputs]) -> list[Inputs]:
    return [{k: t.to(device) for k, t in inputs.items()} for inputs in draws]


def _on_gpu(
    model: nn.Module, draws: Sequence[Inputs], options: Mapping[str, Any]
) -> tuple[Results, list[dict[str, Any]]]:
    """Compiled; the profiler says which kernels ran, and nobody counts bytes."""
    twin = copy.deepcopy(model).cuda()
    compiled = torch.compile(twin, backend="memopt", options=dict(options))
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as seen:
        steps = [_step(compiled, twin, inputs) for inputs in _on("cuda", draws)]
        torch.cuda.synchronize()
    return _stacked(steps), [{"kernel": event.key} for event in seen.key_averages()]


def _interpreted(
    model: nn.Module, draws: Sequence[Inputs], options: Mapping[str, Any]
) -> tuple[Results, list[dict[str, Any]]]:
    """Compiled for a device that is not there, and interpreted on the CPU."""
    fake_cuda.install()
    install()
    twins = Twins()
    twin, steps = _faked(model, twins), []
    # Autograd would make the first gradient itself, with nothing behind it.
    ones = {d: twins.fake(torch.ones((), dtype=d)) for d in (torch.float32, torch.bfloat16)}
    assert has_row_kernel(IndexTargets, ones[torch.float32]), "the device is one of those served"
    with modules_on_cpu(twins) as launches, twins.mode:
        compiled = torch.compile(twin, backend="memopt", options=dict(options))
        for inputs in draws:
            there = {k: twins.fake(t) for k, t in inputs.items()}
            loss, gradients = _step(compiled, twin, there, ones)
            steps.append((twins.real(loss), [twins.real(g) for g in gradients]))
    return _stacked(steps), [
        {
            "kernel": launch.name,
            "programs": launch.programs,
            "requested_bytes": launch.requested_bytes,
            "l2_bytes": launch.l2_bytes,
            "dram_bytes": launch.dram_bytes,
            "conflicts": len(launch.conflicts),
        }
        for launch in launches
    ]


def _faked(model: nn.Module, twins: Twins) -> nn.Module:
    """The same model with fake tensors for its parameters and buffers."""
    twin = copy.deepcopy(model)
    for module in twin.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                fake = nn.Parameter(twins.fake(parameter.detach()), parameter.requires_grad)
                module._parameters[name] = fake
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = twins.fake(buffer)
    return twin
