"""What the pass for divergences leaves alone, with the reason and eager's numbers."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.passes.compiling import assert_as_eager, assert_declined, run_compiled
from tests.passes.two_heads import CLASSES, Function, Inputs, T, kl, log_p


def teacher_trained(i: Inputs) -> Tensor:
    return kl(i.student(), F.linear(i.x[..., :8], i.tw), "sum")


def log_probabilities_returned(i: Inputs) -> Tensor:
    lp = log_p(i.student())
    return F.kl_div(lp, F.softmax(i.teacher() / T, -1), reduction="sum") + lp.max()


def values_escape(i: Inputs) -> Tensor:
    values = kl(i.student(), i.teacher(), "none")
    return values.sum() + values.max()


def values_weighted_by_class(i: Inputs) -> Tensor:
    return (kl(i.student(), i.teacher(), "none") * i.b.detach()).sum()


def values_over_rows(i: Inputs) -> Tensor:
    return kl(i.student(), i.teacher(), "none").sum((0, 1)).square().sum()


def teacher_edited(i: Inputs) -> Tensor:
    q = F.softmax(i.teacher(), -1)
    q[..., 3] = 0.0
    return F.kl_div(log_p(i.student()), q, reduction="sum")


def student_edited(i: Inputs) -> Tensor:
    values = kl(i.student(), i.teacher(), "none")
    values.view(-1, CLASSES).mul_(2.0)
    return values.sum()


def teacher_overwritten(i: Inputs) -> Tensor:
    hidden = i.tx * 1.0
    t = F.linear(hidden, i.tw)
    hidden.add_(1.0)
    return kl(i.student(), t, "sum") + hidden.sum()


def logits_overwritten(i: Inputs) -> Tensor:
    t = i.given * i.temperature
    q = F.softmax(t, -1)
    t.zero_()
    return F.kl_div(log_p(i.student()), q, reduction="sum")


def product_overwritten(i: Inputs) -> Tensor:
    with torch.no_grad():
        t = F.linear(i.tx, i.tw)
        t[..., 3] = -4.0
    return F.kl_div(log_p(i.student()), F.softmax(t, -1), reduction="sum")


def skewed(i: Inputs) -> Tensor:
    """Towards a mixture, one direction alone."""
    p, q = i.student().softmax(-1), i.teacher().softmax(-1)
    return (q * (q.log() - (0.9 * q + 0.1 * p).log())).sum()


def smoothed_logarithm(i: Inputs) -> Tensor:
    p, q = log_p(i.student()).exp(), i.teacher().softmax(-1)
    return (q * (q.log() - (p + 1e-8).log())).sum()


def expanded(i: Inputs) -> Tensor:
    """One teacher's row for all of the student's."""
    q = F.softmax(i.teacher()[:1, :1], -1)
    return -(q * log_p(i.student())).sum()


def gkd_shared(i: Inputs, beta: Tensor) -> Tensor:
    s, t = log_p(i.student()), log_p(i.teacher())
    forward = F.kl_div(s, t, reduction="none", log_target=True)
    return (beta.sin().expand(CLASSES) * forward).sum()


DECLINED: dict[str, tuple[Function, str]] = {
    "teacher needs a gradient": (teacher_trained, "both distributions need a gradient"),
    "log-probabilities read otherwise": (log_probabilities_returned, "also read by max"),
    "values read otherwise": (values_escape, "max_1 reads"),
    "a weight per class": (values_weighted_by_class, "a value for each class"),
    "sums over rows alone": (values_over_rows, "a value for each class"),
    "probabilities overwritten": (teacher_edited, "overwrites values on the way"),
    "values overwritten through a view": (student_edited, "overwrites values on the way"),
    "teacher's hidden state overwritten": (teacher_overwritten, "overwrites an input"),
    "logits at hand overwritten": (logits_overwritten, "overwrites an input"),
    "teacher's product overwritten": (product_overwritten, "overwrites an input"),
    "an unknown divergence": (skewed, "no divergence that is known"),
    "a share that is a tensor": (
        lambda i: gkd_shared(i, i.temperature / 3),
        "a value for each class",
    ),
    "different vocabularies": (
        lambda i: kl(i.student()[..., :300], F.linear(i.tx, i.tw[:300]), "sum"),
        "also read by getitem",
    ),
    "one row expanded": (expanded, "also read by"),
    "a logarithm with a summand": (smoothed_logarithm, "also read by"),
}


@pytest.mark.parametrize("form", DECLINED)
def test_what_cannot_be_served_is_left_alone_with_the_reason(form: str) -> None:
    function, reason = DECLINED[form]
    assert_declined(assert_as_eager(function, Inputs()), reason)


def test_values_that_leave_the_graph_are_left_alone_with_the_reason() -> None:
    inputs = Inputs()
    values, (record,) = run_compiled(lambda i: kl(i.student(), i.teacher(), "none"), inputs)
    torch.testing.assert_close(values, kl(inputs.student(), inputs.teacher(), "none"))
    assert any("output reads" in r.text for r in record.remarks), record.remarks
