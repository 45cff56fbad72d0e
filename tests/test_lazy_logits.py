"""Logits that are not there behave as the eager ones do, and cost less than that to have."""

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from memopt.lazy import rows as lazy_rows
from memopt.lazy.logits import PATIENCE_STEPS, LazyLogits, Usage
from memopt.lazy.rows import Head, Rows
from tests.lazy_uses import (
    EVERY,
    LABELS,
    REDUCE,
    STAY,
    WHOLE,
    B,
    Inputs,
    S,
    Use,
    V,
    assert_same,
    both,
    inputs,
    leaves,
    selected,
)


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


@pytest.mark.parametrize("name", EVERY)
def test_every_use_gives_the_values_and_gradients_of_eager(name: str) -> None:
    use = EVERY[name]
    lazy, eager, made = both()
    assert_same(use(lazy), use(eager), made)


@pytest.mark.parametrize("name", WHOLE)
def test_any_other_use_gives_plain_tensors(name: str) -> None:
    lazy, _, _ = both()
    assert not any(isinstance(leaf, LazyLogits) for leaf in leaves(WHOLE[name](lazy)))


@pytest.mark.parametrize("name", EVERY)
def test_without_gradients_every_use_is_the_same_too(name: str) -> None:
    use = EVERY[name]
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


def test_iteration_gives_lazy_rows() -> None:
    lazy, eager, _ = both()
    rows = list(lazy)
    assert len(rows) == B
    assert all(pending(row) for row in rows)
    torch.testing.assert_close(rows, list(eager))
    torch.testing.assert_close(list(lazy[0, 0]), list(eager[0, 0]))


def test_the_product_has_the_dtype_of_the_forwards_autocast() -> None:
    made = inputs(dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        lazy, eager = LazyLogits(*made), F.linear(*made)
    assert lazy.dtype == eager.dtype == torch.bfloat16
    assert torch.equal(lazy.float(), eager.float())
    with torch.autocast("cpu", torch.float16):
        assert torch.equal(LazyLogits(*made, product_dtype=torch.bfloat16).materialise(), eager)


@pytest.mark.parametrize("name", EVERY)
def test_reading_under_autocast_gives_what_eager_gives(name: str) -> None:
    use = EVERY[name]
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


@pytest.mark.parametrize("wrong", [-1, V, 2**40])
@pytest.mark.parametrize(
    "picked",
    [
        lambda x, i: x.gather(-1, i),
        lambda x, i: x.log_softmax(-1).gather(2, i),
        lambda x, i: torch.gather(x[:, 1:], -1, i[:, 1:].expand(-1, -1, 3)),
        lambda x, i: x.flatten(0, 1).gather(-1, i.flatten(0, 1)),
        lambda x, i: x[1, 2].gather(-1, i[1, 2]),
    ],
)
def test_an_index_out_of_bounds_fails_with_eagers_words(
    picked: Callable[..., Any], wrong: int
) -> None:
    index = LABELS[..., None].clone()
    index[1, 2] = wrong
    lazy, eager, _ = both()
    with pytest.raises(RuntimeError) as expected:
        picked(eager, index)
    with pytest.raises(RuntimeError) as mine:
        picked(lazy, index)
    assert str(mine.value) == str(expected.value)
