"""Attention in many spellings: PyTorch's, written out, masked, grouped, rotated."""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.fuzz.drawing import Draw, Size, Step

Mask = Callable[[Tensor], Tensor | None]


def attention(draw: Draw, size: Size) -> Step:
    """Every query sees itself: eager's own backward is wrong where one sees no key."""
    n, h, d = size.tokens, size.heads, size.width
    keys = draw.one((h, h, h // 2, 1))
    hidden = draw.of(MASKS)
    turn = draw.of({"still": None, "halves": _halves, "pairs": _pairs, "complex": _complex})
    attend = draw.of(SPELLINGS)
    p = draw.one((0.0, 0.0, 0.2))
    packed = draw.chance("packed") and keys == h
    normed = draw.chance("normed", 0.2)

    def run(self: Any, x: Tensor) -> Tensor:
        if packed:
            q, k, v = self.packed(x).view(*x.shape[:2], 3, h, -1).permute(2, 0, 3, 1, 4)
        else:
            q = self.q(x).unflatten(-1, (h, -1)).transpose(1, 2)
            k, v = (
                part.unflatten(-1, (keys, -1)).transpose(1, 2) for part in self.kv(x).chunk(2, -1)
            )
        if turn is not None:
            q, k = turn(q), turn(k)
        if normed:
            q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
        out = attend(q, k, v, hidden(x), p if self.training else 0.0)
        return self.out(out.transpose(1, 2).reshape(x.shape))

    return Step(
        run,
        packed=nn.Linear(d, 3 * d),
        q=nn.Linear(d, d),
        kv=nn.Linear(d, 2 * keys * size.head, bias=draw.chance("bias")),
        out=nn.Linear(d, d, bias=False),
        padding=torch.arange(n) < n - 2,
    )


def _causal(x: Tensor) -> Tensor:
    n = x.shape[1]
    return torch.ones(n, n, dtype=torch.bool, device=x.device).tril()


def _window(x: Tensor) -> Tensor:
    i = torch.arange(x.shape[1], device=x.device)
    apart = i[:, None] - i[None, :]
    return (apart >= 0) & (apart < 5)


def _documents(x: Tensor) -> Tensor:
    i = torch.arange(x.shape[1], device=x.device) // 6
    return (i[:, None] == i[None, :]) & _causal(x)


def _by_data(x: Tensor) -> Tensor:
    """Keys that the hidden states themselves rule out, but for each query's own."""
    shown = (x.detach().sum(-1) > -2)[:, None, None, :]
    return shown | torch.eye(x.shape[1], dtype=torch.bool, device=x.device)


def _added(x: Tensor) -> Tensor:
    return torch.zeros_like(_causal(x), dtype=x.dtype).masked_fill(~_causal(x), -math.inf)


def _least(x: Tensor) -> Tensor:
    least = torch.finfo(x.dtype).min
    return torch.full((x.shape[1], x.shape[1]), least, dtype=x.dtype).triu(1)[None, None]


def _slopes(x: Tensor) -> Tensor:
    i = torch.arange(x.shape[1], dtype=x.dtype)
    slopes = 2.0 ** -torch.arange(1, 5, dtype=x.dtype)
    return slopes[:, None, None] * (i[None, :] - i[:, None]) + _added(x)


def _expanded(x: Tensor) -> Tensor:
    return _causal(x)[None, None].expand(x.shape[0], 1, -1, -1)


MASKS: dict[str, Mask] = {
    "all": lambda x: None,
    "causal": _causal,
    "window": _window,
    "documents": _documents,
    "by_data": _by_data,
    "added": _added,
    "least": _least,
    "slopes": _slopes,
    "expanded": _expanded,
}


def _tables(x: Tensor) -> tuple[Tensor, Tensor]:
    width = x.shape[-1]
    steps = torch.arange(0, width, 2, device=x.device, dtype=torch.float64)
    positions = torch.arange(x.shape[-2], device=x.device, dtype=torch.float64)
    angles = torch.outer(positions, 100.0 ** (-steps / width))
    return angles.cos().to(x.dtype), angles.sin().to(x.dtype)


def _halves(x: Tensor) -> Tensor:
    cos, sin = (torch.cat([t, t], -1) for t in _tables(x))
    a, b = x.chunk(2, -1)
    return x * cos + torch.cat([-b, a], -1) * sin


def _pairs(x: Tensor) -> Tensor:
    cos, sin = _tables(x)
    a, b = x[..., ::2], x[..., 1::2]
    return torch.stack([a * cos - b * sin, b * cos + a * sin], -1).flatten(-2)


def _complex(x: Tensor) -> Tensor:
    wide = x if x.dtype == torch.float64 else x.float()  # there are no complex bfloat16
    z = torch.view_as_complex(wide.reshape(*x.shape[:-1], -1, 2).contiguous())
    cos, sin = _tables(wide)
    return torch.view_as_real(z * torch.complex(cos, sin)).flatten(-2).to(x.dtype)


def _repeated(k: Tensor, heads: int) -> Tensor:
    group = heads // k.shape[1]
    return k[:, :, None].expand(-1, -1, group, -1, -1).flatten(1, 2)


def _fused(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, p: float) -> Tensor:
    k, v = _repeated(k, q.shape[1]), _repeated(v, q.shape[1])
    return F.scaled_dot_product_attention(q, k, v, mask, p)


def _flagged(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, p: float) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, None, p, is_causal=True, enable_gqa=True)


def _grouped(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, p: float) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, mask, p, scale=0.3, enable_gqa=True)


def _scores(q: Tensor, k: Tensor, mask: Tensor | None, fill: float) -> Tensor:
    scores = q @ k.mT / math.sqrt(q.shape[-1])
    if mask is None:
        return scores
    return scores.masked_fill(~mask, fill) if mask.dtype == torch.bool else scores + mask


def _written(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, p: float) -> Tensor:
    k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
    return F.dropout(_scores(q, k, mask, -math.inf).softmax(-1), p) @ v


def _least_filled(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, p: float) -> Tensor:
    k, v = _repeated(k, q.shape[1]), _repeated(v, q.shape[1])
    return F.dropout(_scores(q, k, mask, -1e9).softmax(-1), p) @ v


def _in_float32(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, p: float) -> Tensor:
    k, v = _repeated(k, q.shape[1]), _repeated(v, q.shape[1])
    shares = F.softmax(_scores(q, k, mask, -1e9), -1, dtype=torch.float32).to(q.dtype)
    return torch.matmul(F.dropout(shares, p), v)


def _capped(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, p: float) -> Tensor:
    k, v = _repeated(k, q.shape[1]), _repeated(v, q.shape[1])
    scores = 5 * torch.tanh(_scores(q, k, None, 0.0) / 5)
    if mask is not None:
        scores = torch.where(mask, scores, -1e9) if mask.dtype == torch.bool else scores + mask
    return F.dropout(scores.softmax(-1), p) @ v


def _summed(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, p: float) -> Tensor:
    """By einsum, exponentials and a quotient."""
    k, v = _repeated(k, q.shape[1]), _repeated(v, q.shape[1])
    scores = torch.einsum("bhqd,bhkd->bhqk", q * q.shape[-1] ** -0.5, k)
    if mask is not None:
        scores = scores.masked_fill(~mask, -1e9) if mask.dtype == torch.bool else scores + mask
    weights = (scores - scores.amax(-1, keepdim=True).detach()).exp()
    shares = weights / weights.sum(-1, keepdim=True)
    return torch.einsum("bhqk,bhkd->bhqd", F.dropout(shares, p), v)


def _batched(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, p: float) -> Tensor:
    """By batched products of three dimensions."""
    k, v = _repeated(k, q.shape[1]), _repeated(v, q.shape[1])
    shape, flat = q.shape, [t.flatten(0, 1) for t in (q, k, v)]
    scores = torch.bmm(flat[0], flat[1].transpose(1, 2)).view(*shape[:3], -1) * 0.2
    if mask is not None:
        scores = scores.masked_fill(~mask, -1e9) if mask.dtype == torch.bool else scores + mask
    shares = F.dropout(torch.softmax(scores, -1), p)
    return torch.bmm(shares.flatten(0, 1), flat[2]).view(shape)


def _linear(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, p: float) -> Tensor:
    """Without a softmax."""
    q, k = F.elu(q) + 1, _repeated(F.elu(k) + 1, q.shape[1])
    v = _repeated(v, q.shape[1])
    return q @ (k.mT @ v) / (q @ k.sum(-2, keepdim=True).mT)


SPELLINGS = {
    "fused": _fused,
    "flagged": _flagged,
    "grouped": _grouped,
    "written": _written,
    "least_filled": _least_filled,
    "in_float32": _in_float32,
    "capped": _capped,
    "summed": _summed,
    "batched": _batched,
    "linear": _linear,
}


def library_attention(draw: Draw, size: Size) -> Step:
    """PyTorch's own modules."""
    d, p = size.width, draw.one((0.0, 0.1))

    def attend(self: Any, x: Tensor) -> Tensor:
        hidden = ~_causal(x)
        out, shares = self.own(x, x, x, attn_mask=hidden, need_weights=weights, is_causal=causal)
        return out if shares is None else out * (1 + shares.mean())

    weights = draw.chance("weights")
    causal = not weights and draw.chance("is_causal")
    if draw.chance("encoder"):
        layer = nn.TransformerEncoderLayer(d, 4, 2 * d, p, batch_first=True, norm_first=not causal)
        return Step(lambda self, x: self.own(x, src_mask=~_causal(x)), own=layer)
    return Step(attend, own=nn.MultiheadAttention(d, 4, p, batch_first=True))


ATTENTIONS = (attention, attention, attention, library_attention)
