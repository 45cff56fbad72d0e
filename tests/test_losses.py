"""The public losses: shapes, defaults, autocast, compilation, and what they refuse."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.testing import CompileCounterWithBackend

from bench.meter import Meter
from memopt.errors import ConfigError, DoubleBackwardError
from memopt.losses import (
    contrastive,
    linear_cross_entropy,
    linear_jsd,
    linear_kl_div,
    linear_log_probs,
)
from tests import references
from tests.references import assert_equal_in_float64, logits, run

Tensor = torch.Tensor
BATCH, LENGTH, HIDDEN, CLASSES = 3, 7, 6, 13
IGNORED = -100


def wide(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def head() -> list[Tensor]:
    return [wide(BATCH, LENGTH, HIDDEN), wide(CLASSES, HIDDEN), wide(CLASSES)]


def targets() -> Tensor:
    target = torch.randint(CLASSES, (BATCH, LENGTH))
    target[torch.rand(BATCH, LENGTH) < 0.3] = IGNORED
    return target


def plain_cross_entropy(z: Tensor, target: Tensor, **options: Any) -> Tensor:
    """With classes last, and a z-loss."""
    z_loss, reduction = options.pop("z_loss", 0.0), options.pop("reduction", "mean")
    soft = target.is_floating_point()
    flat = target.flatten(0, -2) if soft else target.flatten()
    counted = torch.ones(len(flat), dtype=torch.bool) if soft else flat != IGNORED
    each: Tensor = F.cross_entropy(z.flatten(0, -2), flat, reduction=reduction, **options)
    penalty: Tensor = z_loss * z.logsumexp(-1).flatten().square() * counted
    if reduction == "none":
        return (each + penalty).view(z.shape[:-1])
    return each + (penalty.sum() if reduction == "sum" else penalty.sum() / counted.sum())


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"label_smoothing": 0.1},
        {"z_loss": 0.01},
        {"class_weight": torch.linspace(0.1, 2, CLASSES, dtype=torch.float64), "z_loss": 0.1},
        {"scale": 0.5, "softcap": 3.0, "z_loss": 0.01},
        {"chunk_rows": 2},
    ],
    ids=str,
)
@pytest.mark.parametrize("soft", [False, True])
def test_cross_entropy_is_that_of_torch_for_any_leading_shape(
    reduction: str, options: dict[str, Any], soft: bool
) -> None:
    target = wide(BATCH, LENGTH, CLASSES).softmax(-1) if soft else targets()
    weight = options.get("class_weight")
    own = {k: v for k, v in options.items() if k in {"label_smoothing", "z_loss"}}
    form = {k: v for k, v in options.items() if k in {"scale", "softcap"}}

    def mine(hidden: Tensor, w: Tensor, bias: Tensor) -> Tensor:
        return linear_cross_entropy(hidden, w, target, bias, reduction=reduction, **options)

    def plain(hidden: Tensor, w: Tensor, bias: Tensor) -> Tensor:
        z = logits(hidden, w, bias, **form)
        return plain_cross_entropy(z, target, reduction=reduction, weight=weight, **own)

    inputs = head()
    g = wide(BATCH, LENGTH) if reduction == "none" else 0.37
    assert_equal_in_float64(run(mine, inputs, g), run(plain, inputs, g))


def test_log_probs_are_those_of_the_targets() -> None:
    inputs, target = head(), targets()
    form: dict[str, Any] = {"scale": 0.5, "softcap": 3.0}

    def mine(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return linear_log_probs(
            hidden, weight, target, bias, temperature=0.7, chunk_rows=4, **form
        )

    def plain(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        log_p = (logits(hidden, weight, bias, **form) / 0.7).log_softmax(-1)
        chosen = log_p.gather(-1, target.clamp(min=0)[..., None])[..., 0]
        return torch.where(target == IGNORED, 0.0, chosen)

    g = wide(BATCH, LENGTH)
    assert_equal_in_float64(run(mine, inputs, g), run(plain, inputs, g))


def test_a_preference_loss_is_built_on_log_probs() -> None:
    weight, target = wide(CLASSES, HIDDEN), targets()[:2]

    def preference(log_probs: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        def loss(hidden: Tensor) -> Tensor:
            chosen, rejected = log_probs(hidden).sum(1)
            return -F.logsigmoid(0.1 * (chosen - rejected))

        return loss

    def plain(hidden: Tensor) -> Tensor:
        each = F.cross_entropy(
            (hidden @ weight.t()).flatten(0, 1), target.flatten(), reduction="none"
        )
        return -each.view(target.shape)

    hidden = [wide(2, LENGTH, HIDDEN)]
    actual = run(preference(lambda h: linear_log_probs(h, weight, target)), hidden)
    assert_equal_in_float64(actual, run(preference(plain), hidden))


@pytest.mark.parametrize("reduction", ["batchmean", "mean", "sum"])
@pytest.mark.parametrize(
    ("loss", "options", "beta"),
    [
        (linear_kl_div, {}, 0.0),
        (linear_kl_div, {"reverse": True}, 1.0),
        (linear_jsd, {}, 0.5),
        (linear_jsd, {"beta": 0.2}, 0.2),
        (linear_jsd, {"beta": 0.0}, 0.0),
        (linear_jsd, {"beta": 1.0}, 1.0),
    ],
    ids=["forward", "reverse", "jsd", "jsd 0.2", "jsd 0", "jsd 1"],
)
def test_divergences_of_two_heads(
    loss: Callable[..., Tensor], options: dict[str, Any], beta: float, reduction: str
) -> None:
    inputs, target = head(), targets()
    teacher_hidden, teacher_weight, teacher_bias = (
        wide(BATCH, LENGTH, 9),
        wide(CLASSES, 9),
        wide(CLASSES),
    )

    def mine(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return loss(
            hidden,
            weight,
            teacher_hidden,
            teacher_weight,
            bias=bias,
            teacher_bias=teacher_bias,
            target=target,
            temperature=2.0,
            reduction=reduction,
            scale=(1.5, 0.5),
            softcap=(3.0, 0.0),
            chunk_rows=4,
            **options,
        )

    def plain(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        z = logits(hidden, weight, bias, scale=1.5, softcap=3.0) / 2.0
        of_teacher = logits(teacher_hidden, teacher_weight, teacher_bias, scale=0.5) / 2.0
        each = references.divergence(z, of_teacher, beta)[target != IGNORED]
        sizes = {"batchmean": each.numel(), "mean": each.numel() * CLASSES, "sum": 1}
        return each.sum() / sizes[reduction]

    assert_equal_in_float64(run(mine, inputs, 0.37), run(plain, inputs, 0.37))


@pytest.mark.parametrize("both", [True, False])
@pytest.mark.parametrize("shape", [(), (1,)])
def test_contrastive_trains_both_sides_and_the_scale(both: bool, shape: tuple[int, ...]) -> None:
    x, y = wide(11, HIDDEN), wide(11 if both else 15, HIDDEN)
    inputs = [x, y, torch.full(shape, 2.0, dtype=torch.float64)]

    def mine(x: Tensor, y: Tensor, log_scale: Tensor) -> Tensor:
        return contrastive(x, y, log_scale.exp(), both=both, chunk_rows=4)

    def plain(x: Tensor, y: Tensor, log_scale: Tensor) -> Tensor:
        return references.contrastive(x, y, log_scale.exp(), both=both)

    assert_equal_in_float64(run(mine, inputs, 3.0), run(plain, inputs, 3.0))


def test_contrastive_takes_a_number_as_its_scale() -> None:
    x, y = wide(11, HIDDEN), wide(11, HIDDEN)
    expected = references.contrastive(x, y, torch.tensor(7.3, dtype=x.dtype), both=True)
    assert_equal_in_float64([contrastive(x, y, 7.3)], [expected])


Loss = Callable[..., Tensor]


def every_loss() -> list[tuple[str, Loss, list[Tensor]]]:
    """Name, function, and the inputs that are trained."""
    target = torch.randint(CLASSES, (BATCH, LENGTH))
    teacher = [torch.randn(BATCH, LENGTH, 9).bfloat16(), torch.randn(CLASSES, 9).bfloat16()]
    hidden, weight = torch.randn(BATCH, LENGTH, HIDDEN), torch.randn(CLASSES, HIDDEN)
    x, y = torch.randn(11, HIDDEN), torch.randn(11, HIDDEN)
    return [
        ("cross entropy", lambda h, w: linear_cross_entropy(h, w, target), [hidden, weight]),
        (
            "cross entropy by rows",
            lambda h, w: linear_cross_entropy(h, w, target, reduction="none"),
            [hidden, weight],
        ),
        ("log probs", lambda h, w: linear_log_probs(h, w, target), [hidden, weight]),
        ("kl", lambda h, w: linear_kl_div(h, w, *teacher), [hidden, weight]),
        ("jsd", lambda h, w: linear_jsd(h, w, *teacher), [hidden, weight]),
        ("contrastive", contrastive, [x, y, torch.tensor(3.0)]),
    ]


EVERY = pytest.mark.parametrize(
    ("loss", "inputs"), [(f, i) for _, f, i in every_loss()], ids=[n for n, _, _ in every_loss()]
)


@EVERY
def test_every_loss_compiles_whole_to_the_same_numbers(
    loss: Loss, inputs: Sequence[Tensor]
) -> None:
    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    for mine, theirs in zip(run(compiled, inputs), run(loss, inputs), strict=True):
        torch.testing.assert_close(mine, theirs)


def test_one_compilation_serves_several_sizes() -> None:
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(contrastive, backend=counter, fullgraph=True, dynamic=True)
    for rows in (300, 500, 3000):
        inputs = [torch.randn(rows, 4), torch.randn(rows, 4), torch.tensor(3.0)]
        for mine, theirs in zip(run(compiled, inputs), run(contrastive, inputs), strict=True):
            torch.testing.assert_close(mine, theirs)
    assert counter.frame_count == 1


@EVERY
def test_autocast_makes_inputs_bfloat16_and_leaves_losses_and_gradients_float32(
    loss: Loss, inputs: Sequence[Tensor]
) -> None:
    """The operator is given the same numbers either way, so the results are the same bits."""

    def under_autocast(*inputs: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return loss(*inputs)

    def by_hand(*inputs: Tensor) -> Tensor:
        return loss(*(t.bfloat16() if t.ndim else t for t in inputs))

    actual, expected = run(under_autocast, inputs), run(by_hand, inputs)
    for mine, theirs in zip(actual, expected, strict=True):
        assert mine.dtype == torch.float32
        assert torch.equal(mine, theirs)


@EVERY
def test_no_loss_has_a_second_derivative(loss: Loss, inputs: Sequence[Tensor]) -> None:
    leaves = [t.clone().requires_grad_() for t in inputs]
    with pytest.raises(DoubleBackwardError, match="second derivative"):
        torch.autograd.grad(loss(*leaves).sum(), leaves, create_graph=True)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_where_gradients_are_off_none_are_set_aside(mode: Callable[[], Any]) -> None:
    hidden, target = torch.randn(256, 64), torch.randint(1024, (256,))
    weight = torch.randn(1024, 64, requires_grad=True)
    teacher = [torch.randn(256, 8), torch.randn(1024, 8)]
    x = torch.randn(1024, 64, requires_grad=True)
    losses: list[Callable[[], Tensor]] = [
        lambda: linear_cross_entropy(hidden, weight, target, chunk_rows=8),
        lambda: linear_kl_div(hidden, weight, *teacher, chunk_rows=8),
        lambda: contrastive(x, x, 2.0, chunk_rows=8),
    ]
    for loss in losses:
        with mode(), Meter() as meter:
            result = loss()
        assert not result.requires_grad
        assert meter.peak_bytes < weight.nbytes == x.nbytes


H, W, T = torch.randn(4, HIDDEN), torch.randn(CLASSES, HIDDEN), torch.zeros(4, dtype=torch.int64)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: linear_cross_entropy(H, W.t(), T), "transpose"),
        (lambda: linear_cross_entropy(H, W, T[:3]), "target is (3,)"),
        (lambda: linear_cross_entropy(H, W, T.int()), "target.long()"),
        (lambda: linear_cross_entropy(H, W.double(), T), "autocast"),
        (lambda: linear_cross_entropy(H, W, T, W[0]), "one per class"),
        (lambda: linear_cross_entropy(H, W, T, class_weight=W[0]), "one per class"),
        (lambda: linear_cross_entropy(H, W, T, reduction="avg"), "'mean', 'sum', 'none'"),
        (lambda: linear_cross_entropy(H, W, T, label_smoothing=1.5), "at most 1"),
        (lambda: linear_cross_entropy(H, W, T, softcap=-1.0), "softcap=-1.0"),
        (lambda: linear_cross_entropy(H, W, T, z_loss=float("nan")), "z_loss=nan"),
        (lambda: linear_cross_entropy(H, W, T, chunk_rows=0), "chunk_rows=0"),
        (lambda: linear_cross_entropy(H, W, torch.rand(4, 5)), "distributions"),
        (
            lambda: linear_cross_entropy(H, W, torch.rand(4, CLASSES).requires_grad_()),
            "target.detach()",
        ),
        (lambda: linear_cross_entropy(H.long(), W, T), "floating point"),
        (lambda: linear_log_probs(H, W, torch.rand(4, CLASSES)), "int64"),
        (lambda: linear_log_probs(H, W, T, temperature=0.0), "temperature=0.0"),
        (lambda: linear_kl_div(H, W, H[:3], W), "all sizes but the last"),
        (lambda: linear_kl_div(H, W, H, W[:-1]), "same classes"),
        (lambda: linear_kl_div(H, W, H, W.t()), "teacher_weight"),
        (lambda: linear_kl_div(H, W, H, W, reduction="none"), "'batchmean'"),
        (lambda: linear_jsd(H, W, H, W, beta=1.1), "beta=1.1"),
        (lambda: contrastive(H, W, 1.0), "both=False"),
        (lambda: contrastive(W, H, 1.0, both=False), "M >= N > 0"),
        (lambda: contrastive(H, H.double(), 1.0), "one dtype"),
        (lambda: contrastive(H, H, torch.ones(2)), "one floating-point element"),
    ],
)
def test_what_does_not_fit_is_named_with_a_remedy(call: Callable[[], Tensor], words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        call()
    assert words in str(caught.value)


def test_a_label_out_of_range_fails_as_in_eager_code() -> None:
    with pytest.raises(IndexError, match=r"Target 13 is out of bounds\."):
        linear_log_probs(H, W, T + CLASSES)


def test_labels_may_be_bytes_as_in_eager_code() -> None:
    hidden, weight, bias = head()
    target = targets().clamp(min=0).to(torch.uint8)
    mine = linear_cross_entropy(hidden, weight, target, bias, ignore_index=0)
    plain = F.cross_entropy(
        logits(hidden, weight, bias).flatten(0, 1), target.view(-1), ignore_index=0
    )
    assert_equal_in_float64([mine], [plain])
