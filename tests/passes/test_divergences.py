"""Distillation as users write it: eager's loss and gradients, and neither head's logits whole."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx

from memopt.backend import compile_graph, read_options
from memopt.lazy_logits import LazyLogits
from memopt.passes import PRE_GRAD
from memopt.passes.heads import memory
from memopt.pipeline import PassContext, Pipeline
from memopt.record import GraphRecord
from tests.references import assert_draws_within_reference_error

BATCH, LENGTH, CLASSES = 4, 6, 307
T = 2.0


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

    def converted(self, dtype: torch.dtype) -> "Inputs":
        """The same numbers in another dtype."""
        other = Inputs(dtype)
        for name, value in vars(self).items():
            floating = value.is_floating_point()
            value = value.detach().to(dtype) if floating else value
            setattr(other, name, value.requires_grad_(getattr(self, name).requires_grad))
        return other

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


# eager says that it should have been batchmean
pytestmark = pytest.mark.filterwarnings("ignore:reduction. 'mean' divides")
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


@pytest.fixture(autouse=True)
def picks_rows() -> Any:
    """``values[mask]`` breaks the graph otherwise."""
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        yield


def options(**chunk: Any) -> dict[str, Any]:
    return {"lowering": "eager", "strict": True, "passes": {"chunk_losses": chunk or True}}


def run(function: Function, inputs: Inputs) -> list[Tensor]:
    """The loss, and the gradients of what has one."""
    for tensor in inputs.trained:
        tensor.grad = None
    loss = function(inputs)
    loss.backward()
    return [loss.detach(), *(t.grad.clone() for t in inputs.trained if t.grad is not None)]


def compiled(function: Function, **chunk: Any) -> tuple[Function, list[GraphRecord]]:
    """The function, and what is said of each of its graphs once it has run."""
    torch._dynamo.reset()
    config, records = read_options(options(**chunk)), list[GraphRecord]()

    def backend(gm: fx.GraphModule, inputs: Sequence[Any]) -> Any:
        return compile_graph(gm, inputs, config, records.append)

    return torch.compile(function, backend=backend, dynamic=False), records


def rewritten(function: Function, inputs: Inputs) -> fx.Graph:
    """The one graph of a function after the pass."""
    graphs: list[fx.Graph] = []

    def backend(gm: fx.GraphModule, _: Any) -> Any:
        Pipeline("pre_grad", PRE_GRAD).run(gm, PassContext(read_options(options())))
        graphs.append(gm.graph)
        return gm.forward

    torch._dynamo.reset()
    torch.compile(function, backend=backend, dynamic=False)(inputs)
    (graph,) = graphs
    return graph


@pytest.mark.parametrize("form", FORMS)
def test_every_spelling_is_found_and_gives_eagers_loss_and_gradients(form: str) -> None:
    inputs = Inputs()
    expected = run(FORMS[form], inputs)
    function, records = compiled(FORMS[form], chunk_rows=5)
    actual = run(function, inputs)
    (record,) = records
    assert record.rewrites["chunk_losses"] >= 1, record.remarks
    assert len(actual) == len(expected)
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("form", FORMS)
def test_no_node_of_the_rewritten_graph_holds_logits(form: str) -> None:
    graph = rewritten(FORMS[form], Inputs())
    assert any("linear_divergence" in str(node.target) for node in graph.nodes)
    at_hand = {memory(node) for node in graph.nodes if node.op == "placeholder"}
    for node in graph.nodes:
        value = node.meta.get("example_value")
        if isinstance(value, Tensor) and memory(node) not in at_hand:
            assert value.numel() < BATCH * (LENGTH - 1) * CLASSES, node


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


def overwritten_before_and_after(i: Inputs) -> Tensor:
    """What the softmax reads is a copy, made between two writes."""
    t = i.given.float()
    t.mul_(3.0)
    loss = F.kl_div(log_p(i.student()), F.softmax(t.double(), -1), reduction="sum")
    t.zero_()
    return loss


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


def gkd_shared(i: Inputs, beta: Tensor) -> Tensor:
    s, t = log_p(i.student()), log_p(i.teacher())
    forward = F.kl_div(s, t, reduction="none", log_target=True)
    return (beta.sin().expand(CLASSES) * forward).sum()


@pytest.mark.parametrize("form", DECLINED)
def test_what_cannot_be_served_is_left_alone_with_the_reason(form: str) -> None:
    plain, reason = DECLINED[form]
    inputs = Inputs()
    expected = run(plain, inputs)
    function, records = compiled(plain)
    actual = run(function, inputs)
    (record,) = records
    assert record.rewrites["chunk_losses"] == 0
    said = [r for r in record.remarks if r.pass_name == "chunk_losses"]
    assert any(reason in r.text for r in said), said
    assert all(r.source for r in said)
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e)


def test_logits_at_hand_are_those_that_the_softmax_reads() -> None:
    inputs = Inputs()
    expected = run(overwritten_before_and_after, inputs)
    function, records = compiled(overwritten_before_and_after)
    actual = run(function, inputs)
    assert records[0].rewrites["chunk_losses"] == 1
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-10, atol=1e-12)


def test_values_that_leave_the_graph_are_left_alone_with_the_reason() -> None:
    inputs = Inputs()
    function, records = compiled(lambda i: kl(i.student(), i.teacher(), "none"))
    values = function(inputs)
    torch.testing.assert_close(values, kl(inputs.student(), inputs.teacher(), "none"))
    (record,) = records
    assert any("output reads" in r.text for r in record.remarks), record.remarks


def test_a_teacher_whose_logits_are_read_otherwise_keeps_them_and_serves_the_student() -> None:
    def plain(i: Inputs) -> Tensor:
        t = i.teacher()
        return kl(i.student(), t, "sum") + 0 * t.argmax(-1).sum()

    inputs = Inputs()
    expected = run(plain, inputs)
    function, records = compiled(plain)
    actual = run(function, inputs)
    (record,) = records
    assert record.rewrites["chunk_losses"] == 1
    assert any("a teacher's logits stay whole: argmax" in r.text for r in record.remarks)
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-10, atol=1e-12)


def operators(function: Function, inputs: Inputs) -> list[str]:
    names = [str(node.target) for node in rewritten(function, inputs).nodes]
    return sorted(name.removeprefix("memopt.") for name in names if "memopt" in name)


def test_a_reduction_alone_computes_its_gradients_in_the_forward() -> None:
    inputs = Inputs()
    for form in ("batchmean", "none, mean", "by hand", "soft cross-entropy"):
        assert operators(FORMS[form], inputs) == ["linear_divergence.default"], form
    for form in ("none, by rows", "generalised, 0.5"):
        assert operators(FORMS[form], inputs) == ["linear_divergence_weighted.default"], form
    for form in ("none, mean over classes", "none, flat then by rows"):
        assert operators(FORMS[form], inputs) == ["linear_divergence_rows.default"], form


def test_both_readers_of_a_student_are_served() -> None:
    both = ["linear_cross_entropy_weighted.default", "linear_divergence_weighted.default"]
    assert operators(hinton, Inputs()) == both
    assert operators(two_divergences, Inputs()) == [both[1]] * 2


def test_without_gradients_none_are_computed() -> None:
    inputs = Inputs()
    for tensor in inputs.trained:
        tensor.requires_grad_(False)
    for form in ("batchmean", "Hinton", "reverse", "generalised, 0.1, sum"):
        graph = rewritten(FORMS[form], inputs)
        asked = [n.args[13] for n in graph.nodes if "linear_divergence" in str(n.target)]
        assert asked == [[False, False, False]], form
        function, records = compiled(FORMS[form])
        torch.testing.assert_close(function(inputs), FORMS[form](inputs))
        assert records[0].rewrites["chunk_losses"] >= 1


@pytest.mark.parametrize("frozen", ["x", "w"])
def test_a_frozen_part_of_the_student_gets_no_gradient_and_the_other_its_own(frozen: str) -> None:
    inputs = Inputs()
    getattr(inputs, frozen).requires_grad_(False)
    expected = run(hinton, inputs)
    function, records = compiled(hinton)
    actual = run(function, inputs)
    assert records[0].rewrites["chunk_losses"] == 1
    assert len(actual) == len(expected) == 2
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "form", ["Hinton", "none, by rows", "reverse", "generalised, 0.5", "logits at hand"]
)
def test_low_precision_is_as_near_to_float64_as_eager_is(form: str, dtype: torch.dtype) -> None:
    function, _ = compiled(FORMS[form], chunk_rows=5)

    def draw() -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        inputs = Inputs(dtype)
        exact = run(FORMS[form], inputs.converted(torch.float64))
        return run(function, inputs), exact, run(FORMS[form], inputs)

    assert_draws_within_reference_error(draw, 20)


@pytest.mark.parametrize("form", ["Hinton", "generalised, 0.1, sum"])
def test_two_runs_are_bitwise_equal(form: str) -> None:
    inputs = Inputs(torch.bfloat16)
    function, _ = compiled(FORMS[form], chunk_rows=5)
    first, second = run(function, inputs), run(function, inputs)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_with_every_row_masked_eagers_nan_and_eagers_zero_gradients() -> None:
    inputs = Inputs()
    inputs.y.fill_(-100)
    form = FORMS["generalised, 0.5"]
    loss, *plain = run(form, inputs)
    function, _ = compiled(form)
    actual, *gradients = run(function, inputs)
    assert loss.isnan()
    assert actual.isnan()
    for a, e in zip(gradients, plain, strict=True):
        torch.testing.assert_close(a, e, equal_nan=True)


def test_lengths_change_without_a_recompilation() -> None:
    frames: list[int] = []

    def backend(gm: fx.GraphModule, inputs: Sequence[Any]) -> Any:
        frames.append(len(inputs))
        return compile_graph(gm, inputs, read_options(options()))

    def function(x: Tensor, tx: Tensor, i: Inputs, mask: Tensor) -> Tensor:
        s, t = F.linear(x, i.w), F.linear(tx, i.tw)
        rows = (kl(s, t, "none") * mask[..., None]).sum(-1)
        return rows.sum() / mask.sum() + kl(s, t, "batchmean") + kl(s, t, "none").mean()

    i = Inputs()
    torch._dynamo.reset()
    compiled = torch.compile(function, backend=backend, dynamic=True)
    for length in (5, 3, 4):
        x, tx, mask = (v[:, :length].contiguous() for v in (i.x, i.tx, i.mask))
        torch.testing.assert_close(compiled(x, tx, i, mask), function(x, tx, i, mask))
    assert len(frames) == 1


@pytest.mark.parametrize("lowering", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_logits_that_are_returned_beside_a_divergence_are_lazy(lowering: str) -> None:
    inputs = Inputs(torch.float32)

    def plain(i: Inputs) -> tuple[Tensor, Tensor]:
        s, t = F.linear(i.x, i.w), F.linear(i.tx, i.tw)
        return kl(s, t), s

    expected, logits = plain(inputs)
    torch._dynamo.reset()
    function = torch.compile(plain, backend="memopt", options={"lowering": lowering})
    loss, lazy = function(inputs)
    assert isinstance(lazy, LazyLogits)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(lazy + 0, logits)
    gradients = (torch.autograd.grad(value, (inputs.x, inputs.w)) for value in (loss, expected))
    for a, e in zip(*gradients, strict=True):
        torch.testing.assert_close(a, e)
