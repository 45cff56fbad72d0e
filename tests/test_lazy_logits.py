"""Logits that are not there behave as the eager ones do, and cost less than that to have."""

import copy
import gc
import io
import pickle
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from memopt import lazy_rows
from memopt._torch import pytree
from memopt.errors import MemoptError, StaleLogitsError
from memopt.lazy_logits import PATIENCE_STEPS, LazyLogits, Usage
from memopt.lazy_rows import Head, Rows

B, S, H, V = 2, 5, 4, 7
Inputs = list[torch.Tensor]
Use = Callable[[Any], Any]

LABELS = torch.arange(B * S).reshape(B, S) % V
MASK = LABELS % 2 == 0


def inputs(seed: int = 0, dtype: torch.dtype = torch.float64, grad: bool = True) -> Inputs:
    generator = torch.Generator().manual_seed(seed)
    shapes = [(B, S, H), (V, H), (V,)]
    made = [torch.randn(s, dtype=torch.float64, generator=generator) for s in shapes]
    return [t.to(dtype).requires_grad_(grad) for t in made]


def both(**options: Any) -> tuple[LazyLogits, torch.Tensor, Inputs]:
    """Lazy logits, what eager has in their place, and what both are made of."""
    made = inputs(**options)
    return LazyLogits(*made), F.linear(*made), made


def pending(x: Any) -> bool:
    return isinstance(x, LazyLogits) and x._rows.pending


@pytest.fixture
def settled(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The shapes that were computed whole."""
    shapes: list[tuple[int, ...]] = []
    settle = Rows.settle

    def noted(rows: Rows, write: bool = False) -> torch.Tensor:
        shapes.append(tuple(rows.like.shape))
        return settle(rows, write)

    monkeypatch.setattr(Rows, "settle", noted)
    return shapes


@pytest.fixture
def products(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The logits of each of the head's products; a chunk is two rows."""
    sizes: list[int] = []
    product = Head.__call__

    def noted(head: Head, hidden: torch.Tensor) -> torch.Tensor:
        z = product(head, hidden)
        sizes.append(z.numel())
        return z

    monkeypatch.setattr(Head, "__call__", noted)
    monkeypatch.setattr(lazy_rows, "CHUNK_BYTES", 2 * V * 8)
    return sizes


def assert_same(actual: Any, expected: Any, made: Inputs) -> None:
    """Values, dtypes, shapes, and gradients with respect to hidden state, weight and bias."""
    pairs = list(zip(leaves(actual), leaves(expected), strict=True))
    assert pairs
    for a, e in pairs:
        assert isinstance(a, torch.Tensor) == isinstance(e, torch.Tensor)
        if not isinstance(e, torch.Tensor):
            assert a == e
            continue
        assert (a.shape, a.dtype, a.requires_grad) == (e.shape, e.dtype, e.requires_grad)
        torch.testing.assert_close(a, e)
        if e.requires_grad:
            upstream = torch.linspace(-1, 2, e.numel(), dtype=e.dtype).reshape(e.shape)
            torch.testing.assert_close(
                torch.autograd.grad(a, made, upstream, retain_graph=True),
                torch.autograd.grad(e, made, upstream, retain_graph=True),
            )


def leaves(x: Any) -> list[Any]:
    return list(pytree.tree_leaves(x))


STAY: dict[str, Use] = {
    "itself": lambda x: x,
    "float": lambda x: x.float(),
    "double": lambda x: x.double(),
    "half": lambda x: x.half(),
    "bfloat16": lambda x: x.bfloat16(),
    "to dtype": lambda x: x.to(torch.float32),
    "to device and dtype": lambda x: x.to("cpu", torch.float32),
    "to another": lambda x: x.to(torch.zeros(1)),
    "type": lambda x: x.type(torch.float32),
    "type_as": lambda x: x.type_as(torch.zeros(1)),
    "cpu": lambda x: x.cpu(),
    "detach": lambda x: x.detach(),
    "contiguous": lambda x: x.contiguous(),
    "clone": lambda x: x.clone(),
    "view": lambda x: x.view(-1, V),
    "view of three": lambda x: x.view(B, 1, S, -1),
    "reshape": lambda x: x.reshape(B * S, V),
    "flatten": lambda x: x.flatten(0, 1),
    "torch.flatten": lambda x: torch.flatten(x, end_dim=1),
    "unflatten": lambda x: x.unflatten(0, (1, B)),
    "squeeze": lambda x: x[:1].squeeze(0),
    "unsqueeze": lambda x: x.unsqueeze(1),
    "shift": lambda x: x[:, :-1],
    "shift with dots": lambda x: x[..., :-1, :],
    "shift and flatten": lambda x: x[..., :-1, :].contiguous().view(-1, V),
    "reshape of a shift": lambda x: x[:, 1:].reshape(-1, V),
    "row": lambda x: x[0],
    "last position": lambda x: x[:, -1],
    "one position": lambda x: x[1, 2],
    "last position, all": lambda x: x[:, -1, :],
    "new dimension": lambda x: x[:, None],
    "new dimension and dots": lambda x: x[None, ..., 1:3, :],
    "steps": lambda x: x[::2, 1::3],
    "mask": lambda x: x[MASK],
    "mask and slice": lambda x: x[MASK, :3],
    "mask of rows": lambda x: x[torch.tensor([False, True])],
    "index": lambda x: x[torch.tensor([1, 0, 1])],
    "two indices": lambda x: x[torch.tensor([0, 1]), torch.tensor([3, 4])],
    "index, apart": lambda x: x[:, torch.tensor([[0, 4]])],
    "vocabulary": lambda x: x[..., :3],
    "vocabulary and rows": lambda x: x[1:, -1, 2:6:2],
    "no vocabulary": lambda x: x[..., :0],
    "select": lambda x: x.select(1, 2),
    "narrow": lambda x: x.narrow(1, 1, 3),
    "split": lambda x: x.split(2, dim=1),
    "torch.split": lambda x: torch.split(x, [1, 4], dim=1),
    "chunk": lambda x: x.chunk(2),
    "unbind": lambda x: x.unbind(1),
    "iteration": list,
    "exp": lambda x: x.exp(),
    "temperature": lambda x: x / 0.7,
    "number times": lambda x: 2 * x,
    "negative": lambda x: -x,
    "softmax": lambda x: F.softmax(x, dim=-1),
    "softmax in fp32": lambda x: torch.softmax(x, -1, dtype=torch.float32),
    "log_softmax": lambda x: x.log_softmax(2),
    "rows of log_softmax": lambda x: x.log_softmax(-1)[:, 1:].flatten(0, 1),
}

REDUCE: dict[str, Use] = {
    "argmax": lambda x: x.argmax(-1),
    "argmax, numpy's way": lambda x: x.argmax(axis=-1),
    "argmax of a shift": lambda x: x[..., :-1, :].contiguous().argmax(dim=-1),
    "torch.argmax": lambda x: torch.argmax(x, dim=2, keepdim=True),
    "argmax of a row": lambda x: x[0, 0].argmax(-1),
    "argmax of nothing": lambda x: x[:, :0].argmax(-1),
    "max": lambda x: tuple(x.max(-1)),
    "min": lambda x: tuple(torch.min(x, dim=-1)),
    "amax": lambda x: x.amax(dim=(-1,)),
    "topk": lambda x: tuple(x.topk(3)),
    "topk of a row": lambda x: tuple(torch.topk(x[1], 2, dim=-1, largest=False)),
    "logsumexp": lambda x: torch.logsumexp(x, dim=-1),
    "logsumexp kept": lambda x: x.logsumexp(-1, keepdim=True),
    "sum": lambda x: x.sum(-1),
    "sum of some": lambda x: x[..., 2:5].sum(-1),
    "gather": lambda x: torch.gather(x, -1, LABELS.unsqueeze(-1)).squeeze(-1),
    "gather by name": lambda x: x.gather(dim=-1, index=LABELS.unsqueeze(-1)),
    "gather nothing": lambda x: x.gather(-1, LABELS.unsqueeze(-1)[..., :0]),
    "log-probability": lambda x: F.log_softmax(x, -1).gather(-1, LABELS[..., None]),
    "entropy": lambda x: entropy(x),
    "selected log-probability": lambda x: selected(x, LABELS),
    "smoothed loss": lambda x: (-F.log_softmax(x, dim=-1)).sum(dim=-1, keepdim=True),
}

WHOLE: dict[str, Use] = {
    "plus": lambda x: x + 1,
    "times a tensor": lambda x: x * torch.ones(V, dtype=x.dtype),
    "equal": lambda x: x == x,
    "cross entropy": lambda x: F.cross_entropy(x.view(-1, V), LABELS.flatten()),
    "all": lambda x: x.sum(),
    "mean": lambda x: x.mean(-1),
    "argmax over rows": lambda x: x.argmax(1),
    "softmax over rows": lambda x: x.softmax(1),
    "transpose": lambda x: x.transpose(0, 1),
    "mT": lambda x: x.mT,
    "data": lambda x: x.data,
    "view with other columns": lambda x: x.view(B, -1),
    "view as bits": lambda x: x.detach().view(torch.int16),
    "split of columns": lambda x: x.split(3, dim=-1),
    "entry": lambda x: x[..., 2],
    "entries": lambda x: x[:, -1, [1, 3]],
    "column after": lambda x: x[..., None],
    "slice of a distribution": lambda x: x.softmax(-1)[..., :3],
    "long": lambda x: x.long(),
    "zeros_like": torch.zeros_like,
    "cat": lambda x: torch.cat([x, torch.zeros_like(x)]),
    "stack": lambda x: torch.stack((x, x)),
    "matmul": lambda x: x @ torch.ones(V, dtype=x.dtype),
    "einsum": lambda x: torch.einsum("bsv->vs", x),
    "list": lambda x: x.tolist(),
    "item": lambda x: x[0, 0, 0].item(),
    "truth": lambda x: bool(x[0, 0, 0] > 0),
    "meshgrid": lambda x: torch.meshgrid(x[0, 0], x[1, 1], indexing="ij"),
    "maximum with": lambda x: torch.max(x, torch.zeros(V, dtype=x.dtype)),
    "product with its detached self": lambda x: x * x.softmax(-1).detach(),
}


def entropy(logits: Any, chunk: int = 3) -> torch.Tensor:
    """As trainers log it."""
    parts = []
    for rows in logits.reshape(-1, logits.shape[-1]).split(chunk, dim=0):
        log_p = F.log_softmax(rows, dim=-1)
        parts.append(-(torch.exp(log_p) * log_p).sum(-1))
    return torch.cat(parts).reshape(logits.shape[:-1])


def selected(logits: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """As trainers of preferences take the labels' log-probabilities."""
    if logits.dtype in (torch.float32, torch.float64):
        chosen = torch.gather(logits, dim=-1, index=index.unsqueeze(-1)).squeeze(-1)
        return chosen - torch.stack([torch.logsumexp(row, dim=-1) for row in logits])
    rows = [
        F.log_softmax(row, dim=-1).gather(dim=-1, index=i.unsqueeze(-1)).squeeze(-1)
        for row, i in zip(logits, index, strict=True)
    ]
    return torch.stack(rows)


@pytest.mark.parametrize("name", STAY)
def test_views_casts_and_steps_stay_lazy(name: str, settled: list[Any]) -> None:
    lazy, eager, made = both()
    result, expected = STAY[name](lazy), STAY[name](eager)
    assert all(pending(leaf) for leaf in leaves(result))
    for r, e in zip(leaves(result), leaves(expected), strict=True):
        assert (r.stride(), r.storage_offset()) == (e.stride(), e.storage_offset())
    assert settled == []
    assert_same(result, expected, made)


@pytest.mark.parametrize("name", REDUCE)
def test_reductions_over_the_vocabulary_hold_a_chunk_at_a_time(
    name: str, products: list[int], settled: list[Any]
) -> None:
    lazy, eager, made = both()
    assert_same(REDUCE[name](lazy), REDUCE[name](eager), made)
    assert max(products) <= 2 * V
    assert settled == []


@pytest.mark.parametrize("name", [*STAY, *REDUCE, *WHOLE])
def test_every_use_gives_the_values_and_gradients_of_eager(name: str) -> None:
    use = {**STAY, **REDUCE, **WHOLE}[name]
    lazy, eager, made = both()
    assert_same(use(lazy), use(eager), made)


@pytest.mark.parametrize("name", WHOLE)
def test_any_other_use_gives_plain_tensors(name: str) -> None:
    lazy, _, _ = both()
    assert not any(isinstance(leaf, LazyLogits) for leaf in leaves(WHOLE[name](lazy)))


@pytest.mark.parametrize("name", [*STAY, *REDUCE, *WHOLE])
def test_without_gradients_every_use_is_the_same_too(name: str) -> None:
    use = {**STAY, **REDUCE, **WHOLE}[name]
    with torch.inference_mode():
        lazy, eager, made = both(grad=False)
        assert_same(use(lazy), use(eager), made)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, None])
@pytest.mark.parametrize("softcap", [0.0, 2.0])
@pytest.mark.parametrize("scale", [1.0, 0.25])
@pytest.mark.parametrize("bias", [False, True])
def test_scale_softcap_bias_and_dtype_are_those_of_the_model(
    bias: bool, scale: float, softcap: float, dtype: torch.dtype | None
) -> None:
    made = inputs()[: 2 + bias]
    lazy = LazyLogits(*made, scale=scale, softcap=softcap, dtype=dtype)
    eager = F.linear(*made) * scale
    if softcap:
        eager = softcap * torch.tanh(eager / softcap)
    eager = eager.to(dtype or torch.float64)
    assert torch.equal(lazy.materialise(), eager)
    assert_same(lazy, eager, made)
    assert_same(lazy[:, 1:, :3].logsumexp(-1), eager[:, 1:, :3].logsumexp(-1), made)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_whole_value_is_bitwise_that_of_eager(dtype: torch.dtype) -> None:
    lazy, eager, _ = both(dtype=dtype)
    assert torch.equal(lazy.materialise(), eager)
    assert torch.equal(lazy.float(), eager.float())
    assert selected(lazy.detach(), LABELS).dtype == dtype


def test_asking_what_it_is_computes_nothing(products: list[int]) -> None:
    lazy, eager, _ = both()
    facts: list[Use] = [
        lambda x: (x.shape, x.dtype, x.device, x.layout, x.ndim, x.requires_grad, x.is_leaf),
        lambda x: (x.size(), x.size(-1), x.dim(), x.numel(), x.nelement(), len(x), x.stride()),
        lambda x: (
            x.is_floating_point(),
            torch.is_floating_point(x),
            x.is_complex(),
            x.grad_fn is None,
        ),
        lambda x: (x.is_cuda, x.is_cpu, x.is_meta, x.is_sparse, x.is_nested, x.get_device()),
        lambda x: (x.nbytes, x.itemsize, x.element_size(), x.storage_offset(), x.is_contiguous()),
        lambda x: (isinstance(x, torch.Tensor), torch.is_tensor(x), x.type(), x.retains_grad),
        lambda x: hash(x) == id(x),
    ]
    for fact in facts:
        assert fact(lazy) == fact(eager)
    assert products == []


def test_it_says_that_it_is_lazy_and_how_to_get_the_values(products: list[int]) -> None:
    lazy, eager, _ = both()
    for text in (repr(lazy), str(lazy), f"{lazy}", f"{lazy!r}"):
        assert all(part in text for part in ("LazyLogits", "(2, 5, 7)", "float64", "materialise"))
    assert products == []
    assert torch.equal(lazy.materialise(), eager)
    assert repr(lazy) == repr(eager)


def test_a_cast_to_what_it_is_returns_it_itself() -> None:
    lazy, _, _ = both()
    assert lazy.double() is lazy
    assert lazy.cpu() is lazy
    assert lazy.contiguous() is lazy
    assert lazy.to("cpu", torch.float64) is lazy


def test_the_values_are_computed_once(products: list[int]) -> None:
    lazy, _, _ = both()
    shifted = lazy[:, :-1]
    for x in (lazy, lazy, lazy.view(-1, V), lazy[0]):
        x + 1
    assert products == [B * S * V]
    shifted + 1  # shares the memory of values that exist now
    assert products == [B * S * V]


def test_a_view_of_everything_computes_for_the_others_too(products: list[int]) -> None:
    lazy, _, _ = both()
    lazy.view(-1, V) + 1
    lazy + 1
    assert products == [B * S * V]


def test_a_view_computes_its_own_rows_only(products: list[int]) -> None:
    lazy, _, _ = both()
    last = lazy[:, -1]
    last + 1
    last + 2
    assert products == [B * V]


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


class Square(torch.autograd.Function):
    """A custom function reaches C++ without asking ``__torch_function__``."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        return 2 * ctx.saved_tensors[0] * gradients[0]


def square(x: torch.Tensor) -> torch.Tensor:
    result: torch.Tensor = Square.apply(x)  # type: ignore[no-untyped-call]
    return result


def past_torch_function(func: Any, *args: Any) -> Any:
    return torch.Tensor.__torch_function__(func, (), args, {})  # type: ignore[no-untyped-call]


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


def test_a_hook_on_the_logits_sees_and_changes_their_gradient(products: list[int]) -> None:
    def gradients(x: Any, made: Inputs) -> Any:
        before = list(products)
        x.register_hook(lambda g: g * 3)
        x.retain_grad()
        assert products == before
        x[:, 1:].logsumexp(-1).sum().backward()
        return [x.grad, *(t.grad for t in made)]

    lazy, _, made = both()
    actual = gradients(lazy, made)
    _, eager, made = both()
    torch.testing.assert_close(actual, gradients(eager, made))


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


def test_iteration_gives_lazy_rows() -> None:
    lazy, eager, _ = both()
    rows = list(lazy)
    assert len(rows) == B
    assert all(pending(row) for row in rows)
    torch.testing.assert_close(rows, list(eager))
    torch.testing.assert_close(list(lazy[0, 0]), list(eager[0, 0]))


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
    for use in {**STAY, **REDUCE, **WHOLE}.values():
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


def test_the_product_has_the_dtype_of_the_forwards_autocast() -> None:
    made = inputs(dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        lazy, eager = LazyLogits(*made), F.linear(*made)
    assert lazy.dtype == eager.dtype == torch.bfloat16
    assert torch.equal(lazy.float(), eager.float())
    with torch.autocast("cpu", torch.float16):
        assert torch.equal(LazyLogits(*made, product_dtype=torch.bfloat16).materialise(), eager)


@pytest.mark.parametrize("name", [*STAY, *REDUCE, *WHOLE])
def test_reading_under_autocast_gives_what_eager_gives(name: str) -> None:
    use = {**STAY, **REDUCE, **WHOLE}[name]
    lazy, eager, made = both(dtype=torch.float32, grad=False)
    with torch.autocast("cpu", torch.bfloat16):
        assert_same(use(lazy), use(eager), made)


def test_a_warning_comes_once_when_several_steps_in_a_row_read_everything() -> None:
    usage = Usage()

    def step(use: Use) -> list[str]:
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            use(LazyLogits(*inputs(), usage=usage))
        return [str(w.message) for w in seen]

    quiet: list[Use] = [lambda x: x[:, -1] + 1, lambda x: x.argmax(-1), lambda x: x.shape]
    for use in [*quiet, lambda x: x + 1, quiet[0]] * PATIENCE_STEPS:
        assert step(use) == []
    for _ in range(PATIENCE_STEPS - 1):
        assert step(lambda x: (x.double()[:, 1:] + 1, x + 1)) == []
    (text,) = step(lambda x: x + 1)
    assert all(part in text for part in ("head product", '"keep"', '"full"'))
    assert usage.steps == 6 * PATIENCE_STEPS
    assert usage.materialised == PATIENCE_STEPS
    assert step(lambda x: x + 1) == []


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


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize(
    "use",
    [
        lambda x: x * 2.0 + 1,
        lambda x: x[:, :-1].argmax(-1) + 1,
        lambda x: F.cross_entropy(x.view(-1, V).float(), LABELS.flatten()) * 2,
        lambda x: {"a": x.sum() if isinstance(x, torch.Tensor) else 0, "b": torch.ones(x.shape)},
        lambda x: F.log_softmax(x, -1).exp().sum(-1),
        lambda x: torch.ones(V, dtype=x.dtype) * x,
    ],
)
def test_another_compiled_function_takes_them(backend: str, use: Use) -> None:
    torch.compiler.reset()
    compiled = torch.compile(use, backend=backend)
    for seed in range(3):
        lazy, eager, made = both(seed=seed)
        assert_same(compiled(lazy), use(eager), made)
