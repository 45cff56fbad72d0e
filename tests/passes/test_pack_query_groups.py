"""Groups of queries and their one head of keys: eager's numbers, and no copies of a cache."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import memopt
from bench.meter import Meter
from memopt.passes.pack_query_groups import PackQueryGroups

BATCH, QUERIES, HEADS, LENGTH, WIDTH = 2, 8, 2, 96, 16
GROUPS = QUERIES // HEADS


def repeat(x: Tensor) -> Tensor:
    batch, heads, length, width = x.shape
    x = x[:, :, None, :, :].expand(batch, heads, GROUPS, length, width)
    return x.reshape(batch, heads * GROUPS, length, width)


def by_getitem(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    return F.scaled_dot_product_attention(q, repeat(k), repeat(v), mask, scale=0.3)


def by_unsqueeze(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    shape = -1, -1, GROUPS, -1, -1
    k, v = (x.unsqueeze(2).expand(shape).flatten(1, 2).contiguous() for x in (k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def by_repeat(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    k, v = (torch.repeat_interleave(x, GROUPS, dim=1) for x in (k, v))
    return F.scaled_dot_product_attention(query=q, key=k, value=v, attn_mask=mask)


def by_option(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, mask, enable_gqa=True)


FORMS = (by_getitem, by_unsqueeze, by_repeat, by_option)


def tensors(queries: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    q = torch.randn(BATCH, QUERIES, queries, WIDTH)
    return q, torch.randn(BATCH, HEADS, LENGTH, WIDTH), torch.randn(BATCH, HEADS, LENGTH, WIDTH)


def some(queries: int = 1, heads: int = 1) -> Tensor:
    """A mask by which each query sees some keys."""
    shown = torch.rand(BATCH, heads, queries, LENGTH) < 0.5
    shown[..., 0] = True
    return shown


def said(function: Any, *arguments: Any) -> list[str]:
    with torch.no_grad():
        report = memopt.explain(function, *arguments, options={"strict": True})
    return [
        remark.text
        for graph in report.graphs
        for remark in graph.remarks
        if remark.pass_name == PackQueryGroups.name
    ]


def compiled(function: Any) -> Any:
    torch._dynamo.reset()
    return torch.compile(function, backend="memopt", fullgraph=True, options={"strict": True})


@pytest.mark.parametrize("masked", ["none", "bool", "additive"])
@pytest.mark.parametrize("form", FORMS)
def test_numbers_and_gradients_are_eagers(form: Any, masked: str) -> None:
    given = [x.double().requires_grad_() for x in tensors()]
    mask = None if masked == "none" else some()
    if masked == "additive" and mask is not None:
        mask = torch.zeros(mask.shape, dtype=torch.double).masked_fill(~mask, -1e30)
    expected = form(*given, mask)
    wanted = torch.autograd.grad(expected.square().sum(), given)
    actual = compiled(form)(*given, mask)
    torch.testing.assert_close(actual, expected)
    for one, other in zip(torch.autograd.grad(actual.square().sum(), given), wanted, strict=True):
        torch.testing.assert_close(one, other)
    (text,) = said(form, *tensors(), mask if masked != "additive" else None)
    assert f"{GROUPS} heads of queries" in text


def test_a_cache_is_not_copied() -> None:
    q, *_ = tensors()
    k, v = torch.randn(1, HEADS, 8192, WIDTH), torch.randn(1, HEADS, 8192, WIDTH)
    shown = torch.arange(8192)[None, None, None] < 5000
    step = compiled(by_getitem)
    with torch.no_grad():
        step(q[:1], k, v, shown)
        with Meter() as meter:
            step(q[:1], k, v, shown)
    assert meter.peak_bytes < k.nbytes // 4


def written(q: Tensor, k: Tensor, v: Tensor, new: Tensor, at: Tensor) -> Tensor:
    k.index_copy_(2, at, new)
    v.index_copy_(2, at, new)
    return by_getitem(q, k, v, torch.arange(LENGTH)[None] <= at)


def overwritten(q: Tensor, k: Tensor, v: Tensor, new: Tensor, at: Tensor) -> Tensor:
    keys, values = repeat(k), repeat(v)
    k.index_copy_(2, at, new)
    return F.scaled_dot_product_attention(q, keys, values) + k.sum()


@pytest.mark.parametrize("form", [written, overwritten])
def test_writes_to_a_cache_are_done_and_seen(form: Any) -> None:
    q, k, v = tensors()
    new, at = torch.randn(BATCH, HEADS, 1, WIDTH), torch.tensor([7])
    caches = [x.clone() for x in (k, v, k, v)]
    step = compiled(form)
    with torch.no_grad():
        actual, expected = step(q, *caches[:2], new, at), form(q, *caches[2:], new, at)
    torch.testing.assert_close(actual, expected)
    for one, other in zip(caches[:2], caches[2:], strict=True):
        assert torch.equal(one, other)
    (text,) = said(form, q, k, v, new, at)
    assert ("overwrites" in text) == (form is overwritten)


def written_to_copies(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    keys, values = repeat(k), repeat(v)
    keys[:, :, 0] = 0
    values.mul_(2)
    return F.scaled_dot_product_attention(q, keys, values)


def copied_before(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    keys, values = repeat(k), repeat(v)
    k.mul_(2)
    return F.scaled_dot_product_attention(q, keys.contiguous(), values.contiguous())


def unevenly(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    counts = torch.tensor([3, 5])
    k, v = (x.repeat_interleave(counts, 1, output_size=QUERIES) for x in (k, v))
    return F.scaled_dot_product_attention(q, k, v)


def tiled(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k.repeat(1, GROUPS, 1, 1), v.repeat(1, GROUPS, 1, 1))


def without_gradient(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with torch.no_grad():
        keys, values = repeat(k), repeat(v)
    return F.scaled_dot_product_attention(q, keys, values)


def under_autocast(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return F.scaled_dot_product_attention(q.bfloat16(), repeat(k), repeat(v)).float()


def named(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    k, v = (torch.repeat_interleave(input=x, repeats=GROUPS, dim=1) for x in (k, v))
    return F.scaled_dot_product_attention(query=q, key=k, value=v)


def of_one_query(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q[:1], repeat(k), repeat(v))


def mapped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    one = lambda q, k, v: by_getitem(q[None], k[None], v[None], None)[0]  # noqa: E731
    return torch.vmap(one)(q, k, v)


@pytest.mark.filterwarnings("ignore:There is a performance drop")  # of vmap, in eager
@pytest.mark.parametrize(
    "form",
    [
        written_to_copies,
        copied_before,
        unevenly,
        tiled,
        without_gradient,
        under_autocast,
        named,
        of_one_query,
        mapped,
    ],
)
def test_what_only_looks_like_groups_has_eagers_numbers(form: Any) -> None:
    def run(function: Any) -> list[Tensor | None]:
        leaves = [x.requires_grad_() for x in tensors()]
        y = function(*(x * 1 for x in leaves))
        y.square().sum().backward()
        return [y.detach(), *(x.grad for x in leaves)]

    for one, other in zip(run(compiled(form)), run(form), strict=True):
        assert (one is None) == (other is None)
        if one is not None and other is not None:
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("length", [96, 200])
def test_a_cache_of_any_length_will_do(length: int) -> None:
    q, k, v = tensors()
    k, v = (torch.cat([x, x, x], 2)[:, :, :length] for x in (k, v))
    torch._dynamo.reset()
    options: Any = {"strict": True}
    step = torch.compile(by_getitem, backend="memopt", dynamic=True, options=options)
    with torch.no_grad():
        for size in (length, length - 5):
            args = q, k[:, :, :size].contiguous(), v[:, :, :size].contiguous(), None
            torch.testing.assert_close(step(*args), by_getitem(*args))


@pytest.mark.parametrize(
    ("form", "queries", "heads", "reason"),
    [
        (by_getitem, 3, 1, "3 queries"),
        (by_getitem, 1, QUERIES, "each head"),
    ],
)
def test_what_would_cost_a_mask_is_left_alone(
    form: Any, queries: int, heads: int, reason: str
) -> None:
    given = (*tensors(queries), some(queries, heads))
    (text,) = said(form, *given)
    assert reason in text
    with torch.no_grad():
        torch.testing.assert_close(compiled(form)(*given), form(*given))


def test_equal_heads_are_no_groups() -> None:
    x = torch.randn(1, 4, 8, 16)
    assert said(F.scaled_dot_product_attention, x, x, x) == []
