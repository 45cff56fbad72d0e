"""Layers that models are made of, in the spellings that people write."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.fuzz.drawing import Draw, Run, Size, Step, weight

Act = Callable[[Tensor], Tensor]

ACTIVATIONS: dict[str, Act] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "silu": F.silu,
    "swish": lambda x: x * x.sigmoid(),
    "squared_relu": lambda x: F.relu(x).square(),
    "softplus": F.softplus,
    "elu": F.elu,
    "leaky_relu": F.leaky_relu,
    "mish": F.mish,
    "hardswish": F.hardswish,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "relu6": F.relu6,
    "sine": torch.sin,
}


def linear(draw: Draw, size: Size) -> Step:
    width, act = size.width, draw.of(ACTIVATIONS)
    ways: dict[str, Run] = {
        "linear": lambda self, h: F.linear(h, self.weight, self.bias),
        "matmul": lambda self, h: h @ self.weight.t() + self.bias,
        "einsum": lambda self, h: torch.einsum("bnd,ed->bne", h, self.weight) + self.bias,
        "addmm": lambda self, h: torch.addmm(
            self.bias, h.reshape(-1, width), self.weight.t()
        ).view_as(h),
        "left": lambda self, h: (self.weight @ h.mT).mT + self.bias,
        "no_bias": lambda self, h: F.linear(h, self.weight),
        "scaled": lambda self, h: F.linear(h, 0.5 * self.weight, self.bias.exp()),
    }
    way = draw.of(ways)
    return Step(lambda self, h: act(way(self, h)), weight=weight(width, width), bias=weight(width))


def feed_forward(draw: Draw, size: Size) -> Step:
    act, wide = draw.of(ACTIVATIONS), draw.one((2, 4)) * size.width
    p = draw.one((0.0, 0.0, 0.3))
    return Step(
        lambda self, h: self.down(F.dropout(act(self.up(h)), p, self.training)),
        up=nn.Linear(size.width, wide, bias=draw.chance("bias")),
        down=nn.Linear(wide, size.width),
    )


def gated(draw: Draw, size: Size) -> Step:
    act, wide = draw.of(ACTIVATIONS), draw.one((1, 2, 3)) * size.width
    ways: dict[str, Run] = {
        "apart": lambda self, h: act(self.gate(h)) * self.up(h),
        "turned": lambda self, h: self.up(h) * act(self.gate(h)),
        "chunks": lambda self, h: _gate(act, *self.both(h).chunk(2, -1)),
        "slices": lambda self, h: _sliced(act, self.both(h)),
        "strided": lambda self, h: _gate(act, self.both(h)[..., ::2], self.both(h)[..., 1::2]),
        "glu": lambda self, h: F.glu(self.both(h), -1),
        "kept": lambda self, h: _gate(act, *self.both(h).split(wide, -1)) + self.both(h)[..., :1],
    }
    way = draw.of(ways)
    return Step(
        lambda self, h: self.down(way(self, h)),
        gate=nn.Linear(size.width, wide, bias=False),
        up=nn.Linear(size.width, wide, bias=False),
        both=nn.Linear(size.width, 2 * wide, bias=draw.chance("bias")),
        down=nn.Linear(wide, size.width, bias=False),
    )


def _gate(act: Act, gate: Tensor, up: Tensor) -> Tensor:
    return act(gate) * up


def _sliced(act: Act, both: Tensor) -> Tensor:
    half = both.shape[-1] // 2
    return both[..., :half] * act(both[..., half:])


def norm(draw: Draw, size: Size) -> Step:
    d, affine = size.width, draw.chance("affine", 0.7)
    modules = {
        "layer_norm": lambda: nn.LayerNorm(d, elementwise_affine=affine),
        "rms_norm": lambda: nn.RMSNorm(d, eps=1e-6, elementwise_affine=affine),
        "layer_norm_of_two": lambda: nn.LayerNorm((size.tokens, d), elementwise_affine=affine),
    }
    return Step(lambda self, h: self.norm(h), norm=draw.of(modules)())


def channel_norm(draw: Draw, size: Size) -> Step:
    d = size.width
    modules = {
        "batch_norm": lambda: nn.BatchNorm1d(d),
        "plain_batch_norm": lambda: nn.BatchNorm1d(d, affine=False, momentum=None),
        "untracked": lambda: nn.BatchNorm1d(d, track_running_stats=False),
        "group_norm": lambda: nn.GroupNorm(4, d),
        "instance_norm": lambda: nn.InstanceNorm1d(d, affine=True, track_running_stats=True),
    }
    module = draw.of(modules)()
    flat = isinstance(module, nn.BatchNorm1d) and draw.chance("flat")
    evaluated = draw.chance("frozen", 0.2)

    def run(self: Any, h: Tensor) -> Tensor:
        if flat:
            return self.norm(h.flatten(0, 1)).view_as(h)
        return self.norm(h.transpose(1, 2)).transpose(1, 2)

    step = Step(run, norm=module)
    return _frozen(step) if evaluated else step


def _frozen(step: Step) -> Step:
    """Its norms stay in eval mode."""
    step.train = lambda mode=True: step  # type: ignore[method-assign]
    for module in step.modules():
        module.training = False
    return step


def written_norm(draw: Draw, size: Size) -> Step:
    wide = draw.chance("in_float32", 0.3)
    ways: dict[str, Run] = {
        "rms": lambda self, x: x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5),
        "rms_by_norm": lambda self, x: x / (x.norm(dim=-1, keepdim=True) / 5.0 + 1e-5),
        "rms_by_sqrt": lambda self, x: x / torch.sqrt((x * x).mean(-1, True) + 1e-5),
        "layer": lambda self, x: _standard(x),
        "normalize": lambda self, x: F.normalize(x, dim=-1),
        "by_std": lambda self, x: (x - x.mean(-1, True)) / (x.std(-1, keepdim=True) + 1e-3),
    }
    way = draw.of(ways)
    one = draw.chance("one_plus_weight", 0.3)

    def run(self: Any, h: Tensor) -> Tensor:
        x = way(self, h.float() if wide else h).to(h.dtype)
        scale: Tensor = self.weight
        return x * (1 + scale) if one else scale * x

    return Step(run, weight=nn.Parameter(torch.randn(size.width)))


def _standard(x: Tensor) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / torch.sqrt(centred.pow(2).mean(-1, keepdim=True) + 1e-5)


def convolution(draw: Draw, size: Size) -> Step:
    d = size.width
    kinds = {
        "pointwise": lambda: nn.Conv1d(d, d, 1),
        "conv": lambda: nn.Conv1d(d, d, 3, padding=1),
        "depthwise": lambda: nn.Conv1d(d, d, 5, padding=2, groups=d),
        "grouped": lambda: nn.Conv1d(d, d, 3, padding="same", groups=4, bias=False),
        "dilated": lambda: nn.Conv1d(d, d, 3, padding=2, dilation=2),
        "reflected": lambda: nn.Conv1d(d, d, 3, padding=1, padding_mode="reflect"),
        "down_up": lambda: nn.Sequential(
            nn.Conv1d(d, d, 4, stride=2, padding=1), nn.ConvTranspose1d(d, d, 4, 2, 1)
        ),
    }
    act = draw.of(ACTIVATIONS)
    causal = draw.chance("causal", 0.3)

    def run(self: Any, h: Tensor) -> Tensor:
        x: Tensor = self.conv(h.mT)
        return act(F.pad(x, (2, 0))[..., :-2] if causal else x).mT

    return Step(run, conv=draw.of(kinds)())


def image(draw: Draw, size: Size) -> Step:
    """Maps of 4 by 4 where tokens were: convolution, norm, pooling and back."""
    d = size.width
    pools: dict[str, Act] = {
        "none": lambda x: x,
        "max": lambda x: F.interpolate(F.max_pool2d(x, 2), scale_factor=2.0),
        "max_of_three": lambda x: F.max_pool2d(x, 3, 1, 1),
        "average": lambda x: F.interpolate(F.avg_pool2d(x, 2), size=x.shape[-2:], mode="bilinear"),
        "adaptive": lambda x: x * F.adaptive_avg_pool2d(x, 1),
        "adaptive_max": lambda x: x + F.adaptive_max_pool2d(x, 2).repeat(1, 1, 2, 2),
        "shuffle": lambda x: F.pixel_unshuffle(F.pixel_shuffle(x, 2), 2),
        "pad": lambda x: F.pad(x, (1, 1, 1, 1), mode="replicate")[..., 2:, :-2],
        "unfold": lambda x: F.fold(F.unfold(x, 2, stride=2), (4, 4), 2, stride=2),
        "unpool": lambda x: F.max_unpool2d(*F.max_pool2d(x, 2, return_indices=True), (2, 2)),
    }
    norms: dict[str, Callable[[], nn.Module]] = {
        "plain": nn.Identity,
        "batch_norm": lambda: nn.BatchNorm2d(d),
        "group_norm": lambda: nn.GroupNorm(8, d),
        "instance_norm": lambda: nn.InstanceNorm2d(d),
    }
    act, pool = draw.of(ACTIVATIONS), draw.of(pools)
    last = draw.chance("channels_last", 0.3)

    def run(self: Any, h: Tensor) -> Tensor:
        x = h.mT.unflatten(-1, (4, 4))
        x = x.contiguous(memory_format=torch.channels_last) if last else x
        x = act(self.norm(self.conv(x)))
        return pool(x).flatten(2).mT

    groups = draw.one((1, 1, 4, d))
    return Step(run, conv=nn.Conv2d(d, d, 3, padding=1, groups=groups), norm=draw.of(norms)())


def low_rank(draw: Draw, size: Size) -> Step:
    """A frozen layer and an adapter beside it."""
    d, rank = size.width, draw.one((2, 4))
    p = draw.one((0.0, 0.2))

    def run(self: Any, h: Tensor) -> Tensor:
        beside = F.dropout(h, p, self.training) @ self.a.t() @ self.b.t()
        return self.base(h) + 0.5 * beside

    base = nn.Linear(d, d).requires_grad_(False)
    return Step(run, base=base, a=weight(rank, d), b=weight(d, rank))


def mixer(draw: Draw, size: Size) -> Step:
    """Tokens mixed by a layer, as in MLP-Mixer, or by a Fourier transform, as in FNet."""
    act = draw.of(ACTIVATIONS)
    ways: dict[str, Run] = {
        "mlp": lambda self, h: act(self.mix(h.mT)).mT,
        "fourier": lambda self, h: torch.fft.fft2(h).real / 16,
        "filter": lambda self, h: torch.fft.irfft(torch.fft.rfft(h, dim=1) * 0.5, dim=1),
        "toeplitz": lambda self, h: torch.einsum("mn,bnd->bmd", self.mix.weight.tril(), h),
    }
    return Step(draw.of(ways), mix=nn.Linear(size.tokens, size.tokens))


LAYERS = (
    linear,
    feed_forward,
    gated,
    norm,
    channel_norm,
    written_norm,
    convolution,
    image,
    low_rank,
    mixer,
)
