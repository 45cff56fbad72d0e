"""What else models do: views, writes in place, draws, choices, states, loops, cut gradients."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from tests.fuzz.drawing import Draw, Run, Size, Step, weight

VIEWS: dict[str, Run] = {
    "turn": lambda self, h: h.transpose(1, 2).sin().transpose(1, 2),
    "reshape": lambda self, h: h.reshape(h.shape[0], -1, 8).cos().reshape(h.shape),
    "roll": lambda self, h: torch.cat([h[:, 3:], h[:, :3]], 1),
    "flip": lambda self, h: h.flip(1).exp().clamp(max=3) + h,
    "split": lambda self, h: torch.cat([a * i for i, a in enumerate(h.split([5, 3, 8], 1))], 1),
    "chunk": lambda self, h: torch.cat(h.chunk(4, -1)[::-1], -1),
    "unbind": lambda self, h: torch.stack([x.tanh() for x in h.unbind(1)[::-1]], 1),
    "slices": lambda self, h: torch.cat([h[:, ::2], h[:, 1::2]], 1),
    "narrow": lambda self, h: h.narrow(1, 2, 8).repeat(1, 2, 1),
    "select": lambda self, h: h + h[:, 0:1] * h[:, -1].unsqueeze(1),
    "expand": lambda self, h: h.mean(1, keepdim=True).expand_as(h) * h,
    "permute": lambda self, h: h.permute(2, 0, 1).contiguous().permute(1, 2, 0),
    "windows": lambda self, h: F.pad(h, (0, 0, 2, 0)).unfold(1, 3, 1).mean(-1),
    "diagonal": lambda self, h: h * torch.einsum("bnn->bn", h @ h.mT)[..., None].sigmoid(),
    "strided": lambda self, h: h.contiguous().as_strided(h.shape, h.stride()) * 2,
    "real": lambda self, h: (
        torch.view_as_complex(h.reshape(*h.shape[:2], -1, 2)).abs().repeat(1, 1, 2)
    ),
    "none": lambda self, h: h[None].squeeze(0)[..., None].squeeze(-1),
    "movedim": lambda self, h: (
        h.movedim(0, 1).flatten(1).unflatten(1, (-1, h.shape[2])).mT.mT.movedim(0, 1)
    ),
    "swap": lambda self, h: h.unflatten(1, (2, -1)).transpose(1, 2).flatten(1, 2),
    "rotate": lambda self, h: torch.rot90(h.unflatten(1, (4, 4)), 1, (1, 2)).flatten(1, 2),
}


def _rows_written(h: Tensor) -> Tensor:
    out = torch.zeros_like(h)
    out[:, ::2] = h[:, 1::2]
    out[:, 1::2] += h[:, ::2] * 2
    return out


def _half_scaled(h: Tensor) -> Tensor:
    y = h * 1.0
    y[..., :8].mul_(0.5).add_(1)
    y[:, 0] = y[:, 1].detach()
    return y


def _added_up(h: Tensor) -> Tensor:
    index = torch.arange(h.shape[1], device=h.device) // 2
    return torch.zeros_like(h).index_add_(1, index, h)


def _scattered(h: Tensor) -> Tensor:
    # By one number: after a norm, sums of rows are nothing but rounding.
    order = h.detach()[..., 0].argsort(1)[..., None].expand_as(h)
    return torch.zeros_like(h).scatter_(1, order, h) + h.gather(1, order)


def _put(h: Tensor) -> Tensor:
    y = h.clone()
    y[:, [1, 3, 3]] = h[:, [0, 2, 4]].sin()
    return y.index_fill_(1, torch.tensor([5, 6], device=h.device), 0.1)


def _masked(h: Tensor) -> Tensor:
    y = h.clone()
    y.masked_fill_(h > 1, 0.5)
    y[y < -1] = -1.0
    return y.relu_().neg_()


def _overwritten(h: Tensor) -> Tensor:
    x = F.relu(h + 1, inplace=True)
    return F.hardtanh((x * 2).sub_(1), -2, 2, inplace=True)


def _written_by_view(h: Tensor) -> Tensor:
    y = h.contiguous().clone()
    flat = y.view(-1, y.shape[-1])
    flat.t().add_(flat.t().detach().cos())
    y.unsqueeze(0).squeeze_(0).mul_(1.5)
    return y


def _copied(h: Tensor) -> Tensor:
    out = h.new_empty(h.shape)
    for i, part in enumerate(h.split(4, 1)):
        out[:, 4 * i : 4 * i + 4].copy_(part.tanh() if i % 2 else part)
    return out


def _by_out(h: Tensor) -> Tensor:
    buffer = torch.empty_like(h)
    torch.mul(h.detach(), 2, out=buffer)
    return h * buffer


IN_PLACE: dict[str, Run] = {
    "rows": lambda self, h: _rows_written(h),
    "half": lambda self, h: _half_scaled(h),
    "index_add": lambda self, h: _added_up(h),
    "scatter": lambda self, h: _scattered(h),
    "index_put": lambda self, h: _put(h),
    "masked": lambda self, h: _masked(h),
    "inplace": lambda self, h: _overwritten(h),
    "by_view": lambda self, h: _written_by_view(h),
    "copy": lambda self, h: _copied(h),
    "out": lambda self, h: _by_out(h),
}

DRAWS: dict[str, Run] = {
    "dropout": lambda self, h: F.dropout(h, 0.3, self.training),
    "dropout1d": lambda self, h: F.dropout1d(h, 0.3, self.training),
    "alpha": lambda self, h: F.alpha_dropout(h, 0.2, self.training),
    "noise": lambda self, h: h + 0.1 * torch.randn_like(h),
    "uniform": lambda self, h: h * (torch.rand(h.shape[1:], dtype=h.dtype) < 0.9),
    "depth": lambda self, h: h * torch.rand(h.shape[0], 1, 1, dtype=h.dtype).add(0.5).floor(),
    "bernoulli": lambda self, h: h + h * torch.bernoulli(torch.full_like(h, 0.2)),
    "rrelu": lambda self, h: F.rrelu(h, training=self.training),
    "gumbel": lambda self, h: h * F.gumbel_softmax(h, hard=True, dim=-1),
    "permutation": lambda self, h: h[:, torch.randperm(h.shape[1])],
    "normal": lambda self, h: torch.normal(h, 0.1),
    "twice": lambda self, h: F.dropout(F.dropout(h, 0.1, self.training), 0.1, self.training),
}

REDUCTIONS: dict[str, Run] = {
    "cumsum": lambda self, h: h.cumsum(1) / 8,
    "cumprod": lambda self, h: h.tanh().add(1.1).cumprod(1).log1p(),
    "logcumsumexp": lambda self, h: h.logcumsumexp(1),
    "softmax": lambda self, h: h.softmax(1) * h,
    "log_softmax": lambda self, h: h.log_softmax(-1),
    "logsumexp": lambda self, h: h - h.logsumexp(-1, keepdim=True),
    "amax": lambda self, h: h - h.amax(1, keepdim=True),
    "sort": lambda self, h: h.sort(1).values,
    "topk": lambda self, h: h + h.topk(3, dim=1).values.sum(1, keepdim=True),
    "median": lambda self, h: h - h.median(1, keepdim=True).values,
    "max": lambda self, h: h * h.max(-1, keepdim=True).indices.ne(3),
    "var": lambda self, h: h / (1 + h.var(1, keepdim=True)),
    "similar": lambda self, h: h * F.cosine_similarity(h, h.roll(1, 1), dim=-1)[..., None],
    "distance": lambda self, h: torch.cdist(h, h.flip(1) + 0.1).softmax(-1) @ h,
    "outer": lambda self, h: h @ torch.einsum("bnd,bne->bde", h, h).softmax(-1),
    "prod": lambda self, h: h + h.tanh().add(1.5).prod(-1, keepdim=True).log1p(),
    "where": lambda self, h: torch.where(h > 0, h.clamp(min=0.1).sqrt(), torch.expm1(h)),
    "minimum": lambda self, h: torch.minimum(h, h.roll(2, 1)) + torch.maximum(h, h.mean()),
    "lerp": lambda self, h: torch.lerp(h, h.roll(1, 1), 0.3),
    "clamped": lambda self, h: h.clamp(h.mean(1, True) - 1, h.mean(1, True) + 1),
    "triangle": lambda self, h: (h @ h.mT).tril().relu() @ h / 16,
    "float32": lambda self, h: (h.float().exp().clamp(max=9) / 3).to(h.dtype),
    "norms": lambda self, h: h / (1e-3 + torch.linalg.vector_norm(h, dim=(1, 2), keepdim=True)),
    "solve": lambda self, h: torch.linalg.solve(
        torch.eye(h.shape[1], dtype=h.dtype) * 9 + (h @ h.mT).tanh(), h
    ),
    "polar": lambda self, h: torch.atan2(h, h.roll(1, -1) + 3) + torch.hypot(h, h + 1),
    "signs": lambda self, h: h.sign() * h.abs().add(0.1).pow(0.7),
    "bits": lambda self, h: h * (h.detach() * 8).to(torch.int32).bitwise_and(3).to(h.dtype),
    "buckets": lambda self, h: (
        h + torch.bucketize(h.detach(), torch.tensor([-1.0, 0.0, 1.0], dtype=h.dtype))
    ),
}


def views(draw: Draw, size: Size) -> Step:
    return _several(draw, VIEWS)


def in_place(draw: Draw, size: Size) -> Step:
    return _several(draw, IN_PLACE)


def draws(draw: Draw, size: Size) -> Step:
    return _several(draw, DRAWS)


def reductions(draw: Draw, size: Size) -> Step:
    return _several(draw, REDUCTIONS)


def _several(draw: Draw, table: dict[str, Run]) -> Step:
    chosen = [draw.of(table) for _ in range(draw.one((1, 2, 3)))]

    def run(self: Any, h: Tensor) -> Tensor:
        for function in chosen:
            h = function(self, h)
        return h

    return Step(run)


def choice(draw: Draw, size: Size) -> Step:
    """Experts and codes: integers that numbers decide on, and numbers that integers pick."""
    d = size.width

    def mixture(self: Any, h: Tensor) -> Tensor:
        shares, chosen = self.router(h).softmax(-1).topk(2, dim=-1)
        every = torch.stack([F.silu(h @ w) for w in self.experts.unbind(0)], -2)
        picked = every.gather(-2, chosen[..., None].expand(*chosen.shape, d))
        return (picked * (shares / shares.sum(-1, keepdim=True))[..., None]).sum(-2)

    def masked(self: Any, h: Tensor) -> Tensor:
        shares = self.router(h).softmax(-1)
        first = F.one_hot(shares.argmax(-1), 4).to(h.dtype)
        out = torch.zeros_like(h)
        for i, w in enumerate(self.experts):
            out = out + torch.where(first[..., i, None] > 0, h @ w, 0) * shares[..., i, None]
        return out

    def codes(self: Any, h: Tensor) -> Tensor:
        nearest = torch.cdist(h.detach(), self.book.weight[None]).argmin(-1)
        code = self.book(nearest)
        return h + (code - h).detach() + 0.1 * code

    def buckets(self: Any, h: Tensor) -> Tensor:
        bucket = (h.detach().sum(-1).abs() * 3).long().clamp(0, 7)
        return h + F.embedding(bucket, self.book.weight, max_norm=None) * (bucket > 2)[..., None]

    def counted(self: Any, h: Tensor) -> Tensor:
        bucket = h.detach().argmax(-1)
        counts = F.one_hot(bucket, d).sum(1).cumsum(-1)
        return h * counts.to(h.dtype)[:, None].rsqrt().nan_to_num(posinf=1.0)

    ways: dict[str, Run] = {
        "mixture": mixture,
        "masked": masked,
        "codes": codes,
        "buckets": buckets,
        "counted": counted,
    }
    return Step(
        draw.of(ways),
        router=nn.Linear(d, 4),
        experts=weight(4, d, d),
        book=nn.Embedding(8, d),
    )


def state(draw: Draw, size: Size) -> Step:
    """Buffers that a step reads and writes."""
    d = size.width

    def average(self: Any, h: Tensor) -> Tensor:
        with torch.no_grad():
            self.mean.lerp_(h.mean((0, 1)), 0.1)
        return h - self.mean

    def count(self: Any, h: Tensor) -> Tensor:
        self.steps += 1
        return h / self.steps.to(h.dtype).sqrt()

    def replaced(self: Any, h: Tensor) -> Tensor:
        before = self.mean
        self.mean = 0.5 * before + h.detach().amax((0, 1))
        return h + before

    def read_then_written(self: Any, h: Tensor) -> Tensor:
        y = h * (1 + self.mean).sin()
        self.mean.copy_(y.detach()[0, 0])
        return y + self.mean

    ways: dict[str, Run] = {
        "average": average,
        "count": count,
        "replaced": replaced,
        "read_then_written": read_then_written,
    }
    return Step(draw.of(ways), mean=torch.zeros(d), steps=torch.zeros((), dtype=torch.int64))


def loop(draw: Draw, size: Size) -> Step:
    """From token to token."""
    d = size.width

    def cell(self: Any, h: Tensor) -> Tensor:
        x, out = torch.zeros_like(h[:, 0]), []
        for token in h.unbind(1)[:6]:
            x = self.cell(token, x)
            out.append(x)
        return h + F.pad(torch.stack(out, 1), (0, 0, 0, h.shape[1] - 6))

    def decayed(self: Any, h: Tensor) -> Tensor:
        decay, x, out = self.decay.sigmoid(), 0 * h[:, 0], torch.empty_like(h)
        for t in range(h.shape[1]):
            x = decay * x + h[:, t]
            out[:, t] = x
        return out

    def refined(self: Any, h: Tensor) -> Tensor:
        x = h
        for _ in range(3):
            x = torch.tanh(F.linear(x, self.cell.weight_ih[:d]) + h)
        return x

    ways: dict[str, Run] = {"cell": cell, "decayed": decayed, "refined": refined}
    return Step(draw.of(ways), cell=nn.GRUCell(d, d), decay=weight(d))


class _Reversed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return -0.5 * grad


class _Rounded(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor) -> Tensor:
        ctx.save_for_backward(x, scale)
        return (x * scale).round() / scale

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, scale = ctx.saved_tensors
        return grad * (x.abs() < 2), (grad * x).sum().expand_as(scale) * 0.01


def cut_off(draw: Draw, size: Size) -> Step:
    """Gradients that stop, turn around or pass straight through."""
    d = size.width

    def frozen(self: Any, h: Tensor) -> Tensor:
        with torch.no_grad():
            target = F.relu(self.own(h))
        return h + 0.1 * target

    def partly(self: Any, h: Tensor) -> Tensor:
        return torch.cat([h[:, :4].detach(), self.own(h[:, 4:])], 1)

    def doubled(self: Any, h: Tensor) -> Tensor:
        with torch.no_grad():
            scale = h.square().mean().sqrt()
            with torch.enable_grad():
                y = self.own(h)
        return y / (1 + scale)

    ways: dict[str, Run] = {
        "frozen": frozen,
        "partly": partly,
        "doubled": doubled,
        "straight": lambda self, h: h + (h.round() - h).detach(),
        "detached_weight": lambda self, h: F.linear(h, self.own.weight.detach()) * h,
        "reversed": lambda self, h: _Reversed.apply(self.own(h)),
        "rounded": lambda self, h: _Rounded.apply(h, self.scale.exp()),
        "nowhere": lambda self, h: self.own(h.detach()),
    }
    return Step(draw.of(ways), own=nn.Linear(d, d), scale=weight(1))


def parametrised(draw: Draw, size: Size) -> Step:
    """Weights that are computed."""
    own = nn.Linear(size.width, size.width)
    ways = {
        "weight_norm": lambda: parametrizations.weight_norm(own),
        "spectral_norm": lambda: parametrizations.spectral_norm(own),
        "orthogonal": lambda: parametrizations.orthogonal(own, orthogonal_map="cayley"),
    }
    return Step(lambda self, h: self.own(h), own=draw.of(ways)())


def mapped(draw: Draw, size: Size) -> Step:
    """Through transforms of torch.func."""
    d = size.width
    ways: dict[str, Run] = {
        "vmap": lambda self, h: torch.vmap(lambda x: x @ x.mT @ x / 16)(h),
        "vmap_inner": lambda self, h: torch.vmap(self.own, in_dims=1, out_dims=1)(h),
        "two": lambda self, h: torch.vmap(torch.vmap(torch.outer))(h, h).softmax(-1).sum(-2),
    }
    return Step(draw.of(ways), own=nn.Linear(d, d))


ODDITIES = (
    views,
    in_place,
    draws,
    draws,
    reductions,
    reductions,
    choice,
    state,
    loop,
    cut_off,
    parametrised,
    mapped,
)
