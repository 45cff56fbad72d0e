"""Losses on one head, in every spelling that the pass for them is to find."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

TOKENS, HIDDEN, CLASSES = 24, 16, 307
BATCH = (4, 6)


class Inputs:
    """Hidden states, a head and targets."""

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        def made(*shape: int) -> Tensor:
            return torch.randn(*shape, dtype=torch.float64)

        self.x, self.w, self.b = made(*BATCH, HIDDEN), made(CLASSES, HIDDEN), made(CLASSES)
        self.y = torch.randint(0, CLASSES, BATCH)
        self.y[0, :3] = -100
        self.known = self.y.clamp(min=0)
        self.soft = made(*BATCH, CLASSES).softmax(-1)
        self.weight = torch.rand(CLASSES, dtype=torch.float64)
        self.buffer = made(1, CLASSES)
        self.count = torch.tensor(17.0, dtype=torch.float64)
        self.mask = torch.rand(BATCH, dtype=torch.float64)
        self.temperature = torch.tensor(1.7, dtype=torch.float64)
        for name, value in vars(self).items():
            setattr(self, name, value.to(dtype) if value.is_floating_point() else value)
        for tensor in self.trained:
            tensor.requires_grad_()

    @property
    def trained(self) -> list[Tensor]:
        return [self.x, self.w, self.b, self.temperature]


Function = Callable[[Inputs], Any]


def flat(z: Tensor) -> Tensor:
    return z.reshape(-1, CLASSES)


def shifted(z: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(flat(z[..., :-1, :].contiguous()), y[..., 1:].reshape(-1))


def padded(i: Inputs, z: Tensor) -> Tensor:
    labels = F.pad(i.y, (0, 1), value=-100)[..., 1:].contiguous().view(-1)
    return (
        F.cross_entropy(z.view(-1, CLASSES), labels, ignore_index=-100, reduction="sum") / i.count
    )


def capped(z: Tensor, cap: float) -> Tensor:
    return torch.tanh(z / cap) * cap


def z_loss(z: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(flat(z), y.flatten()) + 1e-2 * (torch.logsumexp(z, -1) ** 2).mean()


def log_probs(z: Tensor, y: Tensor) -> Tensor:
    return z.log_softmax(-1).gather(-1, y.unsqueeze(-1)).squeeze(-1)


def selected(z: Tensor, y: Tensor) -> Tensor:
    return torch.gather(z, -1, y.unsqueeze(-1)).squeeze(-1) - torch.logsumexp(z, -1)


def ratio(i: Inputs) -> Tensor:
    """The old policy without gradients, the new one with: the same expression twice."""
    logits = F.linear(i.x, i.w)
    with torch.no_grad():
        old = log_probs(logits, i.known)
    return ((log_probs(logits, i.known) - old).exp() * i.mask).sum()


def stacked(z: Tensor, y: Tensor) -> Tensor:
    """A log-sum-exp for each sequence by itself, as trainers write it to save memory."""
    values = torch.gather(z, dim=-1, index=y.unsqueeze(-1)).squeeze(-1)
    return values - torch.stack([torch.logsumexp(rows, dim=-1) for rows in z])


def stacked_log_probs(z: Tensor, y: Tensor) -> Tensor:
    rows = [
        F.log_softmax(own, dim=-1).gather(dim=-1, index=labels.unsqueeze(-1)).squeeze(-1)
        for own, labels in zip(z, y, strict=True)
    ]
    return torch.stack(rows)


def smoothed_by_hand(z: Tensor, y: Tensor) -> Tensor:
    """As transformers' LabelSmoother has it."""
    log_p = -F.log_softmax(z, dim=-1)
    padding, classes = y.unsqueeze(-1).eq(-100), y.unsqueeze(-1).clamp(min=0)
    own, others = log_p.gather(dim=-1, index=classes), log_p.sum(dim=-1, keepdim=True)
    own.masked_fill_(padding, 0.0)
    others.masked_fill_(padding, 0.0)
    count = padding.numel() - padding.long().sum()
    return 0.9 * own.sum() / count + 0.1 * others.sum() / (count * z.shape[-1])


def relu_in_place(i: Inputs) -> Tensor:
    """Writes that nothing reads by name must survive the rewrite."""
    hidden = i.x.detach() * 1
    F.relu(hidden, inplace=True)
    alias = hidden
    alias += 1
    return F.cross_entropy(flat(F.linear(i.x, i.w)), i.y.view(-1)) + hidden.sum()


FORMS: dict[str, Function] = {
    "old and new policy": ratio,
    "beside writes in place": relu_in_place,
    "weight stored the other way round": lambda i: F.cross_entropy(
        flat(i.x @ i.w.t().contiguous()), i.y.view(-1)
    ),
    "two readers, one detached": lambda i: (
        F.cross_entropy(flat(z := F.linear(i.x, i.w)), i.y.view(-1))
        * F.cross_entropy(flat(z.detach()), i.y.view(-1), reduction="sum").sqrt()
    ),
    "three dimensions": lambda i: F.cross_entropy(F.linear(i.x, i.w).transpose(1, 2), i.y),
    "permuted": lambda i: F.cross_entropy(F.linear(i.x, i.w).permute(0, 2, 1), i.y),
    "flattened": lambda i: F.cross_entropy(F.linear(i.x, i.w).flatten(0, 1), i.y.flatten()),
    "matmul": lambda i: F.cross_entropy(flat(i.x @ i.w.t()), i.y.view(-1)),
    "matmul, T": lambda i: F.cross_entropy(flat(torch.matmul(i.x, i.w.T)), i.y.view(-1)),
    "by keyword": lambda i: F.cross_entropy(
        input=flat(F.linear(i.x, i.w)), target=i.y.view(-1), reduction="mean"
    ),
    "selected by keyword": lambda i: (
        (
            torch.gather(input=(z := F.linear(i.x, i.w)), dim=-1, index=i.known[..., None])[..., 0]
            - torch.logsumexp(input=z, dim=-1)
        )
        * i.mask
    ).sum(),
    "bias": lambda i: F.cross_entropy(flat(F.linear(i.x, i.w, i.b)), i.y.view(-1)),
    "buffer bias": lambda i: F.cross_entropy(flat(F.linear(i.x, i.w) + i.buffer), i.y.view(-1)),
    "shifted": lambda i: shifted(F.linear(i.x, i.w), i.y),
    "padded, by count": lambda i: padded(i, F.linear(i.x, i.w)),
    "sum": lambda i: F.cross_entropy(flat(F.linear(i.x, i.w)), i.y.view(-1), reduction="sum"),
    "none, masked": lambda i: (
        F.cross_entropy(F.linear(i.x, i.w).transpose(1, 2), i.y, reduction="none") * i.mask
    ).sum(),
    "none, flat": lambda i: (
        F.cross_entropy(flat(F.linear(i.x, i.w)), i.y.view(-1), reduction="none")
        * i.mask.flatten()
    ).sum(),
    "smoothed": lambda i: F.cross_entropy(
        flat(F.linear(i.x, i.w)), i.y.view(-1), label_smoothing=0.1
    ),
    "class weights": lambda i: F.cross_entropy(
        flat(F.linear(i.x, i.w)), i.y.view(-1), weight=i.weight, label_smoothing=0.2
    ),
    "soft targets": lambda i: F.cross_entropy(flat(F.linear(i.x, i.w)), flat(i.soft)),
    "soft targets, three dimensions": lambda i: F.cross_entropy(
        F.linear(i.x, i.w).transpose(1, 2), i.soft.transpose(1, 2)
    ),
    "softcap": lambda i: F.cross_entropy(flat(capped(F.linear(i.x, i.w), 5.0)), i.y.view(-1)),
    "scale": lambda i: F.cross_entropy(flat(F.linear(i.x, i.w) * 0.25), i.y.view(-1)),
    "divided, in place": lambda i: F.cross_entropy(
        flat(F.linear(i.x, i.w).div_(4.0)), i.y.view(-1)
    ),
    "scale and softcap": lambda i: F.cross_entropy(
        flat(capped(F.linear(i.x, i.w) / 3.0, 2.0)), i.y.view(-1)
    ),
    "temperature that is trained": lambda i: F.cross_entropy(
        flat(F.linear(i.x, i.w) * i.temperature), i.y.view(-1)
    ),
    "smoothed by hand": lambda i: smoothed_by_hand(F.linear(i.x, i.w), i.y),
    "smoothed by hand, scale and bias": lambda i: smoothed_by_hand(
        F.linear(i.x, i.w, i.b) * 0.25, i.y
    ),
    "smoothed by hand, by the mean": lambda i: (
        i.mask
        * (
            -0.9 * log_probs(z := F.linear(i.x, i.w), i.known)
            - 0.1 * z.log_softmax(-1).mean(dim=-1)
        )
    ).sum(),
    "log-softmax and nll": lambda i: F.nll_loss(
        F.log_softmax(flat(F.linear(i.x, i.w)), dim=-1), i.y.view(-1)
    ),
    "z-loss": lambda i: z_loss(F.linear(i.x, i.w), i.y),
    "two temperatures": lambda i: (
        F.cross_entropy(flat(z := F.linear(i.x, i.w)), i.y.view(-1))
        + F.cross_entropy(flat(z * 0.5), i.y.view(-1))
        + torch.logsumexp(z * 0.25, -1).mean()
    ),
    "z-loss, weighted": lambda i: (
        F.cross_entropy(flat(z := F.linear(i.x, i.w)), i.y.view(-1), weight=i.weight)
        + torch.logsumexp(flat(z), 1).square().mean()
    ),
    "log-probabilities": lambda i: (log_probs(F.linear(i.x, i.w), i.known) * i.mask).sum(),
    "selected log-probabilities": lambda i: (selected(F.linear(i.x, i.w), i.known) * i.mask).sum(),
    "stacked log-sum-exps": lambda i: (stacked(F.linear(i.x, i.w), i.known) * i.mask).sum(),
    "stacked log-probabilities": lambda i: (
        stacked_log_probs(F.linear(i.x, i.w), i.known) * i.mask
    ).sum(),
    "stacked out of order": lambda i: (
        torch.stack([torch.logsumexp(rows, -1) for rows in reversed(list(F.linear(i.x, i.w)))])
        * i.mask
    ).sum(),
    "part of a larger loss": lambda i: 3 * shifted(F.linear(i.x, i.w), i.y) ** 2 + i.x.mean(),
    "one token per sequence": lambda i: F.cross_entropy(F.linear(i.x[:, -1], i.w), i.known[:, 0]),
    "tied to an embedding": lambda i: shifted(F.linear(i.x + F.embedding(i.known, i.w), i.w), i.y),
}
