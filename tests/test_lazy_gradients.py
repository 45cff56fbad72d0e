"""Gradients through logits that are not there, and writes to them, are those of eager."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from memopt.lazy.logits import LazyLogits
from tests.lazy_uses import LABELS, MASK, B, S, Use, V, assert_same, both, inputs, square


def past_torch_function(func: Any, *args: Any) -> Any:
    return torch.Tensor.__torch_function__(func, (), args, {})  # type: ignore[no-untyped-call]


def test_detached_logits_have_no_gradient_and_leave_the_others_theirs() -> None:
    lazy, eager, made = both()
    assert not (lazy.detach() + 1).requires_grad
    assert not lazy.detach().logsumexp(-1).requires_grad
    assert_same(lazy.logsumexp(-1), eager.logsumexp(-1), made)


def test_a_read_without_gradients_does_not_lose_them_for_later() -> None:
    lazy, eager, made = both()
    with torch.no_grad():
        assert not (lazy + 1).requires_grad
    assert_same(lazy + 1, eager + 1, made)


def test_logits_made_without_gradients_have_none_later() -> None:
    with torch.no_grad():
        lazy, eager, made = both()
    assert not lazy.requires_grad
    assert not (lazy + 1).requires_grad
    assert not lazy.logsumexp(-1).requires_grad
    assert_same(lazy, eager, made)


@pytest.mark.parametrize("frozen", [0, 1, 2])
def test_a_frozen_input_gets_no_gradient_and_the_others_do(frozen: int) -> None:
    made = inputs()
    made[frozen].requires_grad_(False)
    free = [t for t in made if t.requires_grad]
    lazy, eager = LazyLogits(*made), F.linear(*made)
    assert_same(lazy.logsumexp(-1), eager.logsumexp(-1), free)
    assert_same(lazy + 1, eager + 1, free)


def test_second_derivatives_are_those_of_eager() -> None:
    lazy, eager, made = both()
    second = []
    for x in (lazy, eager):
        loss = x.log_softmax(-1).gather(-1, LABELS[..., None]).pow(2).sum()
        first = torch.autograd.grad(loss, made, create_graph=True)
        squares = torch.stack([g.pow(2).sum() for g in first])
        second.append(torch.autograd.grad(squares.sum(), made))
    torch.testing.assert_close(second[0], second[1])


@pytest.mark.parametrize(
    "use",
    [
        square,
        lambda x: square(x[:, 1:].float().double()),
        lambda x: square(x).logsumexp(-1),
        lambda x: square(x) + x,
        lambda x: past_torch_function(torch.mul, x, x),
        lambda x: past_torch_function(torch.Tensor.__getitem__, x, 0),
        lambda x: past_torch_function(torch.cat, [x, x]),
        torch.as_tensor,
    ],
)
def test_callers_that_skip_torch_function_get_exact_gradients(use: Use) -> None:
    lazy, eager, made = both()
    assert_same(use(lazy), use(eager), made)


@pytest.mark.parametrize("start", [torch.Tensor.backward, torch.autograd.backward])
def test_backward_from_the_logits_reaches_the_inputs(start: Any) -> None:
    lazy, eager, made = both()
    upstream = torch.ones(B, S, V, dtype=torch.float64)
    start(lazy, upstream)
    expected = torch.autograd.grad(eager, made, upstream)
    torch.testing.assert_close([t.grad for t in made], list(expected))


def test_writing_to_the_logits_is_seen_by_every_later_read() -> None:
    def use(x: torch.Tensor) -> Any:
        x[..., 2] = -100.0
        return x, x[0], x.argmax(-1), F.cross_entropy(x.view(-1, V), LABELS.flatten())

    lazy, eager, made = both()
    assert_same(use(lazy), use(eager), made)


def test_writing_to_a_view_is_seen_by_all_that_share_its_memory() -> None:
    def use(x: torch.Tensor) -> Any:
        flat, shifted, same, other = x.view(-1, V), x[:, :-1], x.detach(), x.clone()
        early = x[:, 1:]
        early + 1
        shifted[:, 0].mul_(2.0)
        shifted.div_(0.5)
        return x, flat, shifted, same, other, early, flat[3]

    lazy, eager, made = both(grad=False)
    assert_same(use(lazy), use(eager), made)


@pytest.mark.parametrize(
    "write",
    [
        lambda x: x.masked_fill_(MASK[..., None], 0.0),
        lambda x: x.zero_(),
        lambda x: F.relu(x, inplace=True),
        lambda x: x.__itruediv__(2.0),
        lambda x: torch.Tensor.copy_(x, torch.ones(B, S, V)),
    ],
)
def test_writing_in_place_keeps_the_gradients_of_eager(write: Use) -> None:
    def use(x: torch.Tensor) -> Any:
        write(x)
        return x.exp(), x[0], x.detach()

    lazy, eager, made = both()
    assert_same(use(lazy), use(eager), made)


def test_gradients_that_a_write_in_cpp_would_lose_are_an_error() -> None:
    lazy, _, _ = both()
    view = lazy[:, 1:]
    past_torch_function(torch.Tensor.add_, lazy, 1.0)
    for x in (lazy, view):
        with pytest.raises(RuntimeError, match="changed in place"):
            torch.autograd.backward((x * 2.0 + square(x)).sum())
