"""Distillation through the pass: eager's loss and gradients, and neither head's logits whole."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from memopt.lazy.logits import LazyLogits
from memopt.passes.heads import memory
from tests.passes.compiling import (
    argument,
    assert_as_eager,
    assert_near_float64,
    compiled,
    rewritten,
    run,
)
from tests.passes.two_heads import (
    BATCH,
    CLASSES,
    FORMS,
    LENGTH,
    Function,
    Inputs,
    hinton,
    kl,
    log_p,
    two_divergences,
)
from tests.references import assert_same_bits

# eager says that it should have been batchmean
pytestmark = pytest.mark.filterwarnings("ignore:reduction. 'mean' divides")


@pytest.fixture(autouse=True)
def picks_rows() -> Any:
    """``values[mask]`` breaks the graph otherwise."""
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        yield


@pytest.mark.parametrize("form", FORMS)
def test_every_spelling_is_found_and_gives_eagers_loss_and_gradients(form: str) -> None:
    record = assert_as_eager(FORMS[form], Inputs(), chunk_rows=5)
    assert record.rewrites["chunk_losses"] >= 1, record.remarks


@pytest.mark.parametrize("form", FORMS)
def test_no_node_of_the_rewritten_graph_holds_logits(form: str) -> None:
    graph = rewritten(FORMS[form], Inputs())
    assert any("linear_divergence" in str(node.target) for node in graph.nodes)
    at_hand = {memory(node) for node in graph.nodes if node.op == "placeholder"}
    for node in graph.nodes:
        value = node.meta.get("example_value")
        if isinstance(value, Tensor) and memory(node) not in at_hand:
            assert value.numel() < BATCH * (LENGTH - 1) * CLASSES, node


def overwritten_before_and_after(i: Inputs) -> Tensor:
    """What the softmax reads is a copy, made between two writes."""
    t = i.given.float()
    t.mul_(3.0)
    loss = F.kl_div(log_p(i.student()), F.softmax(t.double(), -1), reduction="sum")
    t.zero_()
    return loss


def test_logits_at_hand_are_those_that_the_softmax_reads() -> None:
    record = assert_as_eager(overwritten_before_and_after, Inputs())
    assert record.rewrites["chunk_losses"] == 1


def test_a_teacher_whose_logits_are_read_otherwise_keeps_them_and_serves_the_student() -> None:
    def plain(i: Inputs) -> Tensor:
        t = i.teacher()
        return kl(i.student(), t, "sum") + 0 * t.argmax(-1).sum()

    record = assert_as_eager(plain, Inputs())
    assert record.rewrites["chunk_losses"] == 1
    assert any("a teacher's logits stay whole: argmax" in r.text for r in record.remarks)


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
        (node,) = (n for n in graph.nodes if "linear_divergence" in str(n.target))
        assert argument(node, "wanted") == [False, False, False], form
        function, records = compiled(FORMS[form])
        torch.testing.assert_close(function(inputs), FORMS[form](inputs))
        assert records[0].rewrites["chunk_losses"] >= 1


@pytest.mark.parametrize("frozen", ["x", "w"])
def test_a_frozen_part_of_the_student_gets_no_gradient_and_the_other_its_own(frozen: str) -> None:
    inputs = Inputs()
    getattr(inputs, frozen).requires_grad_(False)
    assert assert_as_eager(hinton, inputs).rewrites["chunk_losses"] == 1
    assert len(run(hinton, inputs)) == 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "form", ["Hinton", "none, by rows", "reverse", "generalised, 0.5", "logits at hand"]
)
def test_low_precision_is_as_near_to_float64_as_eager_is(form: str, dtype: torch.dtype) -> None:
    assert_near_float64(FORMS[form], lambda: Inputs(dtype), 20, chunk_rows=5)


@pytest.mark.parametrize("form", ["Hinton", "generalised, 0.1, sum"])
def test_two_runs_are_bitwise_equal(form: str) -> None:
    inputs = Inputs(torch.bfloat16)
    function, _ = compiled(FORMS[form], chunk_rows=5)
    assert_same_bits(run(function, inputs), run(function, inputs))


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
    def function(x: Tensor, tx: Tensor, i: Inputs, mask: Tensor) -> Tensor:
        s, t = F.linear(x, i.w), F.linear(tx, i.tw)
        rows = (kl(s, t, "none") * mask[..., None]).sum(-1)
        return rows.sum() / mask.sum() + kl(s, t, "batchmean") + kl(s, t, "none").mean()

    own, records = compiled(function, dynamic=True)
    i = Inputs()
    for length in (5, 3, 4):
        x, tx, mask = (v[:, :length].contiguous() for v in (i.x, i.tx, i.mask))
        torch.testing.assert_close(own(x, tx, i, mask), function(x, tx, i, mask))
    assert len(records) == 1


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
