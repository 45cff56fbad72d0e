"""Heads and losses, in the spellings of training code."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.fuzz.drawing import Draw

Loss = Callable[[Tensor, Tensor], Tensor]


def class_loss(draw: Draw, classes: int) -> Loss:
    """Of logits ``(B, N, V)`` and int64 classes ``(B, N)``, some of which are -100."""
    smoothing = draw.one((0.0, 0.0, 0.1))
    reduction: Any = draw.one(("mean", "mean", "sum"))
    weights = torch.linspace(0.5, 1.5, classes, dtype=torch.float64)

    def plain(z: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(
            z.reshape(-1, classes), y.reshape(-1), label_smoothing=smoothing, reduction=reduction
        )

    def turned(z: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(z.transpose(1, 2), y, reduction=reduction)

    def shifted(z: Tensor, y: Tensor) -> Tensor:
        return plain(z[..., :-1, :].contiguous(), y[..., 1:].contiguous())

    def padded(z: Tensor, y: Tensor) -> Tensor:
        return plain(z, F.pad(y, (0, 1), value=-100)[..., 1:])

    def weighted(z: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(z.flatten(0, 1), y.flatten(), weights.to(z.dtype))

    def masked(z: Tensor, y: Tensor) -> Tensor:
        losses = F.cross_entropy(z.flatten(0, 1), y.flatten(), reduction="none")
        mask = (y.flatten() >= 0).to(z.dtype)
        return (losses * mask).sum() / mask.sum().clamp(min=1)

    def picked(z: Tensor, y: Tensor) -> Tensor:
        log_p = z.log_softmax(-1).gather(-1, y.clamp(min=0)[..., None]).squeeze(-1)
        return -(log_p * (y >= 0)).sum() / (y >= 0).sum().clamp(min=1)

    def with_z(z: Tensor, y: Tensor) -> Tensor:
        return plain(z, y) + 1e-2 * z.logsumexp(-1).square().mean()

    def by_nll(z: Tensor, y: Tensor) -> Tensor:
        return F.nll_loss(F.log_softmax(z, -1).flatten(0, 1), y.flatten(), reduction=reduction)

    def smoothed(z: Tensor, y: Tensor) -> Tensor:
        log_p = -z.log_softmax(-1)
        kept = y.ne(-100)
        nll = log_p.gather(-1, y.clamp(min=0)[..., None]).squeeze(-1)
        return ((0.9 * nll + 0.1 * log_p.mean(-1)) * kept).sum() / kept.sum()

    def rewarded(z: Tensor, y: Tensor) -> Tensor:
        log_p = z.log_softmax(-1).gather(-1, y.clamp(min=0)[..., None]).squeeze(-1)
        ratio = (log_p - log_p.detach() + 0.1 * y.to(z.dtype).sin()).exp()
        return -torch.minimum(ratio, ratio.clamp(0.9, 1.05)).mul(y >= 0).sum(1).mean()

    def focal(z: Tensor, y: Tensor) -> Tensor:
        losses = F.cross_entropy(z.flatten(0, 1), y.flatten(), reduction="none")
        return ((1 - (-losses).exp()) ** 2 * losses).mean()

    def distilled(z: Tensor, y: Tensor) -> Tensor:
        teacher = (z.detach().roll(1, -1) / 2).softmax(-1)
        kl = F.kl_div(
            (z / 2).log_softmax(-1).flatten(0, 1), teacher.flatten(0, 1), reduction="sum"
        )
        return kl / z.shape[0] + plain(z, y)

    def entropy(z: Tensor, y: Tensor) -> Tensor:
        p = z.softmax(-1)
        return plain(z, y) - 0.1 * -(p * p.clamp(min=1e-9).log()).sum(-1).mean()

    def margin(z: Tensor, y: Tensor) -> Tensor:
        return F.multi_margin_loss(z.flatten(0, 1), y.clamp(min=0).flatten())

    def binary(z: Tensor, y: Tensor) -> Tensor:
        return F.binary_cross_entropy_with_logits(
            z, F.one_hot(y.clamp(min=0), classes).to(z.dtype), reduction=reduction
        )

    return draw.of(
        {
            "plain": plain,
            "turned": turned,
            "shifted": shifted,
            "padded": padded,
            "weighted": weighted,
            "masked": masked,
            "picked": picked,
            "with_z": with_z,
            "by_nll": by_nll,
            "smoothed": smoothed,
            "rewarded": rewarded,
            "focal": focal,
            "distilled": distilled,
            "entropy": entropy,
            "margin": margin,
            "binary": binary,
        }
    )


def number_loss(draw: Draw) -> Loss:
    """Of hidden states ``(B, N, D)`` and numbers of the same shape."""
    reduction: Any = draw.one(("mean", "sum"))

    def contrastive(h: Tensor, y: Tensor) -> Tensor:
        a, b = F.normalize(h.mean(1), dim=-1), F.normalize(y.mean(1), dim=-1)
        z = 10 * a @ b.mT
        labels = torch.arange(len(z), device=z.device)
        return (F.cross_entropy(z, labels) + F.cross_entropy(z.mT, labels)) / 2

    def masked(h: Tensor, y: Tensor) -> Tensor:
        return ((h - y).square() * (y > -1)).sum() / (y > -1).sum()

    return draw.of(
        {
            "mse": lambda h, y: F.mse_loss(h, y, reduction=reduction),
            "l1": lambda h, y: F.l1_loss(h, y, reduction=reduction),
            "huber": lambda h, y: F.huber_loss(h, y, reduction=reduction),
            "smooth": lambda h, y: F.smooth_l1_loss(h, y, reduction=reduction, beta=0.5),
            "kl": lambda h, y: F.kl_div(h.log_softmax(-1), y.softmax(-1), reduction="batchmean"),
            "jsd": lambda h, y: F.kl_div(
                ((h.softmax(-1) + y.softmax(-1)) / 2).log(), y.log_softmax(-1), log_target=True
            ),
            "cosine": lambda h, y: (1 - F.cosine_similarity(h, y, -1)).mean(),
            "contrastive": contrastive,
            "masked": masked,
            "square": lambda h, y: (h - y).pow(2).mean(),
            "triplet": lambda h, y: F.triplet_margin_loss(h.mean(1), y.mean(1), y.amax(1)),
            "poisson": lambda h, y: F.poisson_nll_loss(h.clamp(max=3), y.abs()),
            "gaussian": lambda h, y: F.gaussian_nll_loss(h, y, F.softplus(h) + 0.1),
        }
    )
