"""Distillation as users write it, in every spelling that the pass for losses is to find."""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

T = 2.0
BATCH, LENGTH, CLASSES = 4, 6, 307


class Inputs:
    """A student's head, which is trained, and a teacher's, which is not."""

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        def made(*shape: int) -> Tensor:
            return torch.randn(*shape).to(dtype)

        self.x, self.w = made(BATCH, LENGTH, 16), made(CLASSES, 16)
        self.tx, self.tw = made(BATCH, LENGTH, 8), made(CLASSES, 8)
        self.b, self.tb = made(CLASSES), made(CLASSES)
        self.given = self.tx @ self.tw.t()
        self.mask = torch.rand(BATCH, LENGTH).to(dtype)
        self.y = torch.randint(0, CLASSES, (BATCH, LENGTH))
        self.y[0, :3] = -100
        self.temperature = torch.tensor(1.7, dtype=dtype)
        for tensor in self.trained:
            tensor.requires_grad_()

    @property
    def trained(self) -> list[Tensor]:
        return [self.x, self.w, self.b]

    def student(self) -> Tensor:
        return F.linear(self.x, self.w)

    def teacher(self) -> Tensor:
        with torch.no_grad():
            return F.linear(self.tx, self.tw)


Function = Callable[[Inputs], Any]


def flat(z: Tensor) -> Tensor:
    return z.view(-1, CLASSES)


def log_p(z: Tensor, temperature: float = T) -> Tensor:
    return F.log_softmax(z / temperature, dim=-1)


def kl(s: Tensor, t: Tensor, reduction: str = "batchmean", *, log_target: bool = False) -> Tensor:
    of_teacher = log_p(t) if log_target else F.softmax(t / T, dim=-1)
    return F.kl_div(log_p(s), of_teacher, reduction=reduction, log_target=log_target)


def hinton(i: Inputs) -> Tensor:
    s, t = i.student(), i.teacher()
    ce = F.cross_entropy(flat(s), i.y.view(-1))
    return 0.3 * ce + 0.7 * kl(flat(s), flat(t)) * T**2


def hinton_by_rows(i: Inputs) -> Tensor:
    s, t = i.student().double(), i.teacher().double()
    ce = F.cross_entropy(s.transpose(1, 2), i.y)
    rows = kl(s, t, "none").sum(-1) * (i.y != -100)
    return ce + rows.sum() / (i.y != -100).sum()


def shifted(i: Inputs) -> Tensor:
    s, t = i.student()[..., :-1, :], i.teacher()[..., :-1, :]
    return kl(s.reshape(-1, CLASSES), t.reshape(-1, CLASSES))


def module(i: Inputs) -> Tensor:
    criterion = torch.nn.KLDivLoss(reduction="sum", log_target=True)
    loss: Tensor = criterion(i.student().log_softmax(-1), i.teacher().log_softmax(-1))
    return loss


def by_hand(i: Inputs) -> Tensor:
    s, t = i.student(), i.teacher()
    p_t, log_p_t = F.softmax(t / T, -1), F.log_softmax(t / T, -1)
    return (p_t * (log_p_t - log_p(s))).sum(-1).mean()


def by_hand_log(i: Inputs) -> Tensor:
    p = i.teacher().softmax(-1)
    return ((p * (p.log() - i.student().log_softmax(-1))).sum(dim=-1) * i.mask).sum()


def soft(i: Inputs) -> Tensor:
    return -(F.softmax(i.teacher(), -1) * F.log_softmax(i.student(), -1)).sum(-1).mean()


def soft_masked(i: Inputs) -> Tensor:
    soft = torch.sum(-F.softmax(i.given, -1) * log_p(i.student(), 1.0), dim=2)
    return (soft * i.mask).sum() / i.mask.sum()


def reverse(i: Inputs) -> Tensor:
    values = F.kl_div(log_p(i.teacher()), log_p(i.student()), log_target=True, reduction="none")
    return (values.sum(-1) * i.mask).sum()


def reverse_by_hand(i: Inputs) -> Tensor:
    log_q, log_s = log_p(i.teacher()), log_p(i.student())
    return (log_s.exp() * (log_s - log_q)).sum(-1).mean()


def gkd(
    i: Inputs,
    beta: float,
    reduction: str = "batchmean",
    *,
    masked: bool = True,
    tensor: bool = True,
) -> Tensor:
    """Generalised Jensen-Shannon, as a trainer for it does."""
    s, t = log_p(i.student(), 0.9), log_p(i.teacher(), 0.9)
    if beta == 0:
        jsd = F.kl_div(s, t, reduction="none", log_target=True)
    elif beta == 1:
        jsd = F.kl_div(t, s, reduction="none", log_target=True)
    else:
        b: Any = torch.tensor(beta, dtype=s.dtype) if tensor else beta
        own: Any = torch.log1p(-b) if tensor else math.log1p(-beta)
        other: Any = torch.log(b) if tensor else math.log(beta)
        mixture = torch.logsumexp(torch.stack([s + own, t + other]), dim=0)
        of_teacher = F.kl_div(mixture, t, reduction="none", log_target=True)
        of_student = F.kl_div(mixture, s, reduction="none", log_target=True)
        jsd = b * of_teacher + (1 - b) * of_student
    mask = i.y != -100
    if masked:
        jsd = jsd[mask]
    if reduction == "batchmean":
        return jsd.sum() / mask.sum() if masked else jsd.sum() / jsd.size(0)
    return jsd.sum() if reduction == "sum" else jsd.mean()


def jensen_shannon(i: Inputs) -> Tensor:
    p, q = i.student().log_softmax(-1), i.teacher().log_softmax(-1)
    log_m = torch.logaddexp(p, q) + math.log(0.5)
    values = 0.5 * F.kl_div(log_m, p, reduction="none", log_target=True)
    values = values + 0.5 * F.kl_div(log_m, q, reduction="none", log_target=True)
    return values.sum(-1).mean()


def mixed_probabilities(i: Inputs) -> Tensor:
    p, q = i.student().softmax(-1), i.teacher().softmax(-1)
    log_m = (0.25 * q + 0.75 * p).log()
    values = 0.25 * q * (q.log() - log_m) + 0.75 * p * (p.log() - log_m)
    return (values * i.mask.unsqueeze(-1)).sum()


def masked_fill(i: Inputs) -> Tensor:
    values = kl(i.student(), i.teacher(), "none", log_target=True)
    return values.masked_fill((i.y == -100).unsqueeze(-1), 0.0).sum() / (i.y != -100).sum()


def own_past(i: Inputs) -> Tensor:
    """The student's own distribution at another temperature, held fixed."""
    s = i.student()
    return kl(s, s.detach() * 0.5, "sum")


def detached_teacher(i: Inputs) -> Tensor:
    """One hidden state for both heads, and only the student's trains it."""
    t = F.linear(i.x, i.w * 0.5 + 1).detach()
    return kl(i.student(), t, "sum")


def two_divergences(i: Inputs) -> Tensor:
    """Forward and reverse, of the same two distributions."""
    s, t = log_p(i.student()), log_p(i.teacher())
    forward = F.kl_div(s, t, reduction="batchmean", log_target=True)
    backward = F.kl_div(t, s, reduction="none", log_target=True).sum(-1)
    return forward + (backward * i.mask).sum()


def two_students(i: Inputs) -> Tensor:
    t = i.teacher()
    return kl(i.student(), t, "sum") + kl(F.linear(i.x * 2, i.w, i.b), t, "batchmean")


def teacher_watched(i: Inputs) -> Tensor:
    """The teacher's own loss is of interest too."""
    t = i.teacher()
    return kl(flat(i.student()), flat(t)) + 0 * F.cross_entropy(flat(t), i.y.view(-1))


def capped(z: Tensor) -> Tensor:
    return torch.tanh(z / 5.0) * 5.0


FORMS: dict[str, Function] = {
    "batchmean": lambda i: kl(flat(i.student()), flat(i.teacher())) * T**2,
    "batchmean, three dimensions": lambda i: kl(i.student(), i.teacher()),
    "sum": lambda i: kl(i.student(), i.teacher(), "sum"),
    "mean": lambda i: kl(i.student(), i.teacher(), "mean"),
    "none, all": lambda i: kl(i.student(), i.teacher(), "none").sum(),
    "none, mean": lambda i: kl(i.student(), i.teacher(), "none").mean(),
    "none, by rows": lambda i: (kl(i.student(), i.teacher(), "none").sum(-1) * i.mask).sum(),
    "none, kept dimension": lambda i: (
        kl(i.student(), i.teacher(), "none").sum(-1, keepdim=True).squeeze(-1) * i.mask
    ).mean(),
    "none, weighted before": lambda i: (
        (kl(i.student(), i.teacher(), "none") * i.mask[..., None]).sum(dim=(1, 2)).mean()
    ),
    "none, mean over classes": lambda i: (
        kl(i.student(), i.teacher(), "none").mean(-1).square().sum()
    ),
    "none, flat then by rows": lambda i: (
        kl(i.student(), i.teacher(), "none").view(-1, CLASSES).sum(1).max()
    ),
    "log target": lambda i: kl(i.student(), i.teacher(), log_target=True) * T**2,
    "KLDivLoss": module,
    "shifted": shifted,
    "Hinton": hinton,
    "Hinton, by rows": hinton_by_rows,
    "by hand": by_hand,
    "by hand, logarithm of probabilities": by_hand_log,
    "soft cross-entropy": soft,
    "soft cross-entropy, logits at hand": soft_masked,
    "reverse": reverse,
    "reverse, by hand": reverse_by_hand,
    "logits at hand": lambda i: kl(flat(i.student()), flat(i.given)),
    "logits at hand, shifted": lambda i: kl(i.student()[:, :-1], i.given[:, :-1], "sum"),
    "bias and softcap": lambda i: kl(
        capped(F.linear(i.x, i.w, i.b)), capped(F.linear(i.tx, i.tw, i.tb)), "sum"
    ),
    "temperature in a tensor": lambda i: F.kl_div(
        F.log_softmax(i.student() / i.temperature, -1),
        F.softmax(i.teacher() / i.temperature, -1),
        reduction="batchmean",
    ),
    "generalised, 0.5": lambda i: gkd(i, 0.5),
    "generalised, 0.1, sum": lambda i: gkd(i, 0.1, "sum"),
    "generalised, 0.9, mean": lambda i: gkd(i, 0.9, "mean"),
    "generalised, 0.3, plain number": lambda i: gkd(i, 0.3, tensor=False),
    "generalised, 0": lambda i: gkd(i, 0),
    "generalised, 1": lambda i: gkd(i, 1),
    "generalised, unmasked": lambda i: gkd(i, 0.5, masked=False),
    "generalised, unmasked, mean": lambda i: gkd(i, 0.5, "mean", masked=False),
    "Jensen-Shannon": jensen_shannon,
    "Jensen-Shannon, of probabilities": mixed_probabilities,
    "masked_fill": masked_fill,
    "own past": own_past,
    "detached teacher": detached_teacher,
    "forward and reverse": two_divergences,
    "two students": two_students,
    "teacher's own loss": teacher_watched,
}
