"""Models that each exercise one thing a compiler can get wrong."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import grad, jvp, vmap

from bench.zoo.model import Inputs, Recipe


def _gated_silu(gate: Tensor, up: Tensor) -> Tensor:
    """The operator's forward, opaque to the compiler."""
    return F.silu(gate) * up


def _gated_silu_backward(ctx: object, grad_out: Tensor) -> tuple[Tensor, Tensor]:
    gate, up = ctx.saved_tensors  # type: ignore[attr-defined]
    sigmoid = torch.sigmoid(gate)
    slope = sigmoid * (1 + gate * (1 - sigmoid))
    return grad_out * up * slope, grad_out * gate * sigmoid


def _gated_silu_save(ctx: object, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)  # type: ignore[attr-defined]


def _register() -> None:
    """Define ``bench_zoo::gated_silu`` unless a second import of this module finds it there."""
    if hasattr(torch.ops.bench_zoo, "gated_silu"):
        return
    op = torch.library.custom_op("bench_zoo::gated_silu", _gated_silu, mutates_args=())
    op.register_fake(lambda gate, up: torch.empty_like(gate))
    op.register_autograd(_gated_silu_backward, setup_context=_gated_silu_save)


_register()


class CustomOp(nn.Module):
    """A residual network whose activation is a custom operator with a fake and an autograd."""

    def __init__(self, layers: int, width: int) -> None:
        super().__init__()
        self.wide = nn.ModuleList(nn.Linear(width, 4 * width) for _ in range(layers))
        self.narrow = nn.ModuleList(nn.Linear(2 * width, width) for _ in range(layers))

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        for wide, narrow in zip(self.wide, self.narrow, strict=True):
            gate, up = wide(F.layer_norm(x, x.shape[-1:])).chunk(2, -1)
            x = x + narrow(torch.ops.bench_zoo.gated_silu(gate.contiguous(), up.contiguous()))
        return F.mse_loss(x, y), x


class InPlace(nn.Module):
    """In-place updates of intermediates and of buffers, and a scatter into an activation.

    The buffers follow the activations and never feed them, so a step repeats exactly.
    """

    rows: Tensor
    mean: Tensor
    steps: Tensor

    def __init__(self, layers: int, width: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(layers))
        self.register_buffer("rows", torch.tensor([0, 2, 5]))
        self.register_buffer("mean", torch.zeros(layers, width))
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        self.steps.add_(1)
        for index, layer in enumerate(self.layers):
            h = F.gelu(layer(x))
            h.mul_(0.5)
            h.index_put_((self.rows,), x[self.rows].tanh())
            h.add_(x)
            self.mean[index].mul_(0.9).add_(h.detach().mean(0), alpha=0.1)
            h[:, ::2] *= 1.5
            x = F.layer_norm(h, h.shape[-1:])
        return F.mse_loss(x, y), x


class ControlFlow(nn.Module):
    """Branches on the value of a tensor, twice: a graph break under Dynamo each time."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU())
        self.second = nn.Sequential(nn.Linear(4 * width, 4 * width), nn.Tanh())
        self.third = nn.Linear(4 * width, width)

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        h = self.first(x)
        h = self.second(h) if h.mean() > 0 else self.second(-h)
        for _ in range(3):
            if h.abs().sum() < 0:
                break
            h = F.silu(self.second(h)) + h
        out = self.third(h)
        return F.mse_loss(out, y), out


class PerSampleGradients(nn.Module):
    """A loss plus a penalty on each sample's own gradient: ``vmap(grad)`` inside a backward."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.wide = nn.Parameter(torch.randn(4 * width, width) / width**0.5)
        self.narrow = nn.Parameter(torch.randn(width, 4 * width) / (4 * width) ** 0.5)

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        def sample_loss(wide: Tensor, narrow: Tensor, x: Tensor, y: Tensor) -> Tensor:
            return F.mse_loss(narrow @ torch.tanh(wide @ x), y)

        gradients = vmap(grad(sample_loss, (0, 1)), (None, None, 0, 0))
        per_sample = gradients(self.wide, self.narrow, x, y)
        norms = sum(g.flatten(1).square().sum(1) for g in per_sample).sqrt()
        losses = vmap(sample_loss, (None, None, 0, 0))(self.wide, self.narrow, x, y)
        return losses.mean() + 0.1 * norms.mean(), norms


class NestedJvp(nn.Module):
    """A physics-informed loss: the second directional derivative of a network by nested jvp."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.Linear(a, b, bias=b > 1) for a, b in ((2, width), (width, width), (width, 1))
        )

    def _network(self, x: Tensor) -> Tensor:
        for layer in self.layers[:-1]:
            x = torch.tanh(layer(x))
        return self.layers[-1](x)  # type: ignore[no-any-return]

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        direction = torch.ones_like(x)

        def slope(x: Tensor) -> Tensor:
            return jvp(self._network, (x,), (direction,))[1]  # type: ignore[no-any-return]

        first, second = jvp(slope, (x,), (direction,))  # type: ignore[misc]
        return F.mse_loss(second + first, y), second


class ContrastiveHead(nn.Module):
    """Two projections and CLIP's loss on them, which reads ``(batch, batch)`` similarities."""

    def __init__(self, width: int, size: int) -> None:
        super().__init__()
        self.image = nn.Linear(width, size, bias=False)
        self.text = nn.Linear(width, size, bias=False)
        self.logit_scale = nn.Parameter(torch.tensor(2.66))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        image, text = F.normalize(self.image(x), dim=-1), F.normalize(self.text(y), dim=-1)
        scale = self.logit_scale.exp()
        by_image, by_text = scale * image @ text.T, scale * text @ image.T
        labels = torch.arange(len(x), device=x.device)
        return (F.cross_entropy(by_image, labels) + F.cross_entropy(by_text, labels)) / 2


def pairs(build: Callable[[], nn.Module], batch: int, width_in: int, width_out: int) -> Recipe:
    """A recipe with random inputs `x (batch, width_in)` and targets `y (batch, width_out)`."""

    def inputs(seed: int) -> Inputs:
        generator = torch.Generator().manual_seed(seed)
        return {
            "x": torch.randn(batch, width_in, generator=generator),
            "y": torch.randn(batch, width_out, generator=generator),
        }

    return Recipe(build, inputs)
