"""Lazy logits go stale with what they are made of, are saved as plain tensors, and die in time."""

import copy
import gc
import io
import pickle
import weakref
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from memopt._torch import pytree
from memopt.errors import MemoptError, StaleLogitsError
from memopt.lazy.logits import LazyLogits
from tests.lazy_uses import EVERY, MASK, Use, V, both, inputs, leaves, square


def test_it_is_saved_and_copied_as_a_plain_tensor() -> None:
    def saved(x: torch.Tensor) -> Any:
        file = io.BytesIO()
        torch.save({"logits": x}, file)
        file.seek(0)
        return torch.load(file)["logits"]

    _, eager, _ = both()
    copies: list[Use] = [
        saved,
        lambda x: pickle.loads(pickle.dumps(x)),
        copy.copy,
        lambda x: copy.deepcopy(x.detach()),
        lambda x: torch.tensor(x.detach().tolist(), dtype=x.dtype),
        lambda x: torch.from_numpy(x.detach().numpy()),
        lambda x: torch.from_numpy(np.asarray(x.detach())),
        lambda x: torch.utils.dlpack.from_dlpack(x.detach()),
        lambda x: pytree.tree_map(lambda leaf: leaf.detach().cpu() + 0, {"a": [x]})["a"][0],
    ]
    for made in copies:
        lazy, _, _ = both()
        result = made(lazy)
        assert type(result) is torch.Tensor
        assert torch.equal(result, eager)


def test_a_deep_copy_of_logits_with_gradients_fails_as_in_eager() -> None:
    for x in both()[:2]:
        with pytest.raises(RuntimeError, match="deepcopy protocol"):
            copy.deepcopy(x)


def test_code_that_wants_the_memory_itself_gets_an_error_and_no_crash() -> None:
    lazy, _, _ = both(grad=False)
    with pytest.raises(RuntimeError, match="data pointer"):
        torch.utils.dlpack.to_dlpack(lazy)  # type: ignore[attr-defined]
    assert lazy.data_ptr() == lazy.materialise().data_ptr() != 0


def test_an_optimizer_step_before_the_first_read_is_an_error() -> None:
    for use in EVERY.values():
        lazy, _, made = both()
        made[1].grad = torch.ones_like(made[1])
        torch.optim.SGD(made[1:2], lr=0.1).step()
        with pytest.raises(StaleLogitsError, match=r"the head's weight .*optimizer.step\(\)"):
            [leaf.tolist() for leaf in leaves(use(lazy))]


@pytest.mark.parametrize("which", [0, 1, 2])
def test_views_are_stale_too_whatever_was_changed(which: int) -> None:
    lazy, _, made = both(grad=False)
    early = lazy[:, 1:, :3].float()
    made[which].add_(1)
    late = lazy[MASK]
    for x in (lazy, early, late):
        assert x.shape[-1] in (3, V)
        with pytest.raises(StaleLogitsError, match='"keep"'):
            x.tolist()
    assert issubclass(StaleLogitsError, (MemoptError, RuntimeError))


def test_a_weight_that_was_freed_is_an_error_and_no_crash() -> None:
    lazy, _, made = both(grad=False)
    made[1].untyped_storage().resize_(0)
    with pytest.raises(StaleLogitsError, match="freed"):
        lazy.argmax(-1)


def test_values_that_were_read_in_time_outlive_the_step() -> None:
    lazy, eager, made = both()
    expected = eager.tolist()
    lazy.materialise()
    with torch.no_grad():
        made[1].add_(1)
    assert lazy.tolist() == expected
    assert lazy[0].tolist() == expected[0]


def test_a_backward_after_the_weight_changed_is_an_error() -> None:
    for start in (lambda x: x.logsumexp(-1).sum(), lambda x: square(x).sum()):
        lazy, _, made = both()
        loss = start(lazy)
        with torch.no_grad():
            made[1].add_(1)
        with pytest.raises(RuntimeError):
            torch.autograd.backward(loss)


def test_inference_tensors_have_no_version_and_are_read_all_the_same() -> None:
    with torch.inference_mode():
        made = inputs(grad=False)
        lazy = LazyLogits(*made)
    eager = F.linear(*made)
    assert torch.equal(lazy.argmax(-1), eager.argmax(-1))
    torch.testing.assert_close(lazy[:, 1:] + 1, eager[:, 1:] + 1)


def test_nothing_keeps_the_logits_alive() -> None:
    uses: list[Use] = [
        lambda x: x + 1,
        lambda x: x[:, 1:].float().logsumexp(-1).sum().backward(),
        lambda x: torch.autograd.backward(square(x).sum()),
        lambda x: x.register_hook(lambda g: g),
    ]
    gc.disable()
    try:
        for use in uses:
            hidden, weight, bias = inputs()
            lazy = LazyLogits(hidden * 1, weight, bias)
            watched: list[Any] = [weakref.ref(lazy), weakref.ref(lazy._rows.hidden)]
            use(lazy)
            del lazy
            assert [w() for w in watched] == [None, None]
    finally:
        gc.enable()


KEPT: dict[str, Use] = {
    "detached": lambda x: x.detach(),
    "a view, detached": lambda x: x[:, 1:].detach(),
    "detached twice": lambda x: x.detach().float().detach(),
    "made without gradients": torch.no_grad()(lambda x: x.float()),
}


@pytest.mark.parametrize("kept", KEPT)
def test_what_has_no_gradient_does_not_keep_the_graph_alive(kept: str) -> None:
    class Sine(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            ctx.save_for_backward(saved := x + 0)
            watched.append(weakref.ref(saved))
            return x.sin()

        @staticmethod
        def backward(ctx: Any, *g: torch.Tensor) -> torch.Tensor:
            slope: torch.Tensor = ctx.saved_tensors[0].cos()
            return g[0] * slope

    watched: list[Any] = []
    hidden, weight, bias = inputs()
    sine = Sine.apply(hidden)  # type: ignore[no-untyped-call]
    expected = KEPT[kept](F.linear(sine, weight, bias)).clone()
    lazy = LazyLogits(sine, weight, bias)
    mine = KEPT[kept](lazy)
    assert watched[0]() is not None
    gc.disable()
    try:
        del lazy, sine
        assert watched[0]() is None
    finally:
        gc.enable()
    torch.testing.assert_close(mine + 0, expected)


@pytest.mark.parametrize("read_first", [False, True])
@pytest.mark.parametrize("alive", [False, True])
@pytest.mark.parametrize("through", ["itself", "detached"])
def test_detached_logits_share_what_is_written(
    read_first: bool, alive: bool, through: str
) -> None:
    results = []
    for x in both()[:2]:
        first, second = x.detach(), x[:, 1:].detach()
        if read_first:
            second.tolist()
        with torch.no_grad():
            (x if through == "itself" else first).mul_(2)
        if not alive:
            del x
        results.append((first + 0, second + 0))
    torch.testing.assert_close(*results)


def test_entropy_of_detached_logits_stays_lazy() -> None:
    lazy, eager, _ = both()
    p, log_p = lazy.softmax(-1).detach(), lazy.log_softmax(-1).detach()
    product = p * log_p
    assert isinstance(product, LazyLogits)
    torch.testing.assert_close(
        product.sum(-1), (eager.softmax(-1) * eager.log_softmax(-1)).sum(-1)
    )
