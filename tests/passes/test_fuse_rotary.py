"""Rotary embeddings in every spelling become one operator, and what is none stays as it is."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

import memopt
from memopt.kernels import rotary
from memopt.remarks import RemarkKind
from tests.passes.compiling import argument
from tests.passes.fusing import (
    Fused,
    assert_is_fused,
    assert_is_fused_at_any_length,
    assert_is_left,
)
from tests.passes.rotary_forms import (
    BATCH,
    HEADS,
    PART,
    SIZE,
    Turn,
    draw,
    heads,
    rotate_chunks,
    rotate_half,
    rotate_pairs,
    rotate_unbound,
    turned,
    wide,
)

is_fused = partial(assert_is_fused, pass_name="fuse_rotary")
is_left = partial(assert_is_left, pass_name="fuse_rotary")


def in_float32(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return turned(wide(x), wide(cos), wide(sin)).to(x.dtype)


def of_a_part(x: Tensor, cos: Tensor, sin: Tensor, rotate: Any = rotate_half) -> Tensor:
    width = cos.shape[-1]
    rotated, rest = x[..., :width], x[..., width:]
    return torch.cat([turned(rotated, cos, sin, rotate), rest], dim=-1)


def split_off(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    rotated, rest = torch.split(x, [PART, SIZE - PART], dim=-1)
    return torch.cat((turned(rotated, cos, sin), rest), dim=-1)


def last_part(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    rest, rotated = x[..., : SIZE - PART], x[..., SIZE - PART :]
    return torch.cat((rest, turned(rotated, cos, sin)), dim=-1)


def by_halves(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = torch.chunk(x, 2, dim=-1)
    cos, sin = cos[..., : SIZE // 2], sin[..., : SIZE // 2]
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def by_pairs(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x[..., ::2], x[..., 1::2]
    cos, sin = cos[..., ::2], sin[..., ::2]
    pairs = torch.stack((first * cos - second * sin, second * cos + first * sin), dim=-1)
    return pairs.flatten(-2)


def come_apart(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x[..., ::2], x[..., 1::2]
    cos, sin = cos[..., : SIZE // 2], sin[..., : SIZE // 2]
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def other_way_round(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    return x * cos + torch.cat((x[..., half:], -x[..., :half]), dim=-1) * sin


def complex_numbers(x: Tensor, cos: Tensor, sin: Tensor, reverse: bool = False) -> Tensor:
    pairs = torch.view_as_complex(wide(x).reshape(*x.shape[:-1], -1, 2))
    angles = torch.complex(wide(cos)[..., ::2].contiguous(), wide(sin)[..., ::2].contiguous())
    pairs = pairs.flip(-1) if reverse else pairs
    return torch.view_as_real(pairs * angles).flatten(3).type_as(x)


SPELLINGS: dict[str, tuple[Turn, int, bool]] = {
    "Llama": (turned, SIZE, False),
    "chunks": (partial(turned, rotate=rotate_chunks), SIZE, False),
    "in float32": (in_float32, SIZE, False),
    "by halves": (by_halves, SIZE, False),
    "the other way round": (other_way_round, SIZE, False),
    "a part": (of_a_part, PART, False),
    "a part, split off": (split_off, PART, False),
    "the last part": (last_part, PART, False),
    "pairs": (partial(turned, rotate=rotate_pairs), SIZE, True),
    "pairs, unbound": (partial(turned, rotate=rotate_unbound), SIZE, True),
    "pairs by halves": (by_pairs, SIZE, True),
    "pairs come apart": (come_apart, SIZE, False),
    "complex numbers": (complex_numbers, SIZE, True),
    "a part in pairs": (partial(of_a_part, rotate=rotate_pairs), PART, True),
}


def attention(form: Turn) -> Callable[..., Tensor]:
    """Scores of queries and keys `(B, H, S, D)`."""

    def scores(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
        own = form(heads(q), cos, sin), form(heads(k), cos, sin)
        return own[0] @ own[1].transpose(2, 3)

    return scores


def positions_first(form: Turn) -> Callable[..., Tensor]:
    """The same of queries and keys `(B, S, H, D)`."""

    def scores(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        cos, sin = cos.unsqueeze(2), sin.unsqueeze(2)
        own = (form(x.view(BATCH, -1, HEADS, SIZE), cos, sin).transpose(1, 2) for x in (q, k))
        return torch.matmul(next(own), next(own).transpose(2, 3))

    return scores


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("form", SPELLINGS)
def test_every_spelling_of_queries_and_keys_is_one_operator(form: str, dtype: torch.dtype) -> None:
    function, size, interleaved = SPELLINGS[form]
    for layout in (attention, positions_first):
        fused = is_fused(layout(function), lambda: draw(size, interleaved, dtype), operators=2)
        (call,) = fused.calls(rotary.ROTARY)
        assert argument(call, "interleaved") == interleaved
        assert argument(call, "rotary_dim") == size
        left = [n for n in fused.graph.nodes if n.target in (torch.cat, torch.stack)]
        assert len(left) == 2 * (form == "the last part")


def test_tables_may_be_those_of_positions_alone() -> None:
    def scores(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        own = turned(heads(q), cos[0], sin[0]), turned(heads(k), cos[0], sin[0])
        return own[0] @ own[1].transpose(2, 3)

    assert len(is_fused(scores, draw, operators=2).calls(rotary.ROTARY)) == 1


def test_a_sequence_without_a_batch_is_one() -> None:
    def scores(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        cos, sin = (t[0].unsqueeze(-2).float() for t in (cos, sin))
        own = (turned(x[0].view(-1, HEADS, SIZE), cos, sin).transpose(0, 1) for x in (q, k))
        return torch.matmul(next(own), next(own).transpose(1, 2))

    assert len(is_fused(scores, draw, operators=2).calls(rotary.ROTARY)) == 1


def test_fewer_heads_of_keys_are_turned_with_the_queries() -> None:
    def scores(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
        own = turned(heads(q), cos, sin), turned(heads(k)[:, :1], cos, sin)
        return own[0] @ own[1].transpose(2, 3)

    assert len(is_fused(scores, draw, operators=2).calls(rotary.ROTARY)) == 1


def test_queries_and_keys_with_tables_of_their_own_are_two_operators() -> None:
    def scores(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
        own = turned(heads(q), cos, sin), turned(heads(k), sin, cos)
        return own[0] @ own[1].transpose(2, 3)

    assert len(is_fused(scores, draw, operators=2).calls(rotary.ROTARY)) == 2


def test_keys_made_of_turned_queries_are_turned_by_themselves() -> None:
    def scores(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
        query = turned(heads(q), cos, sin)
        key = turned(heads(k) + query.tanh(), cos, sin)
        return query @ key.transpose(2, 3)

    assert len(is_fused(scores, draw, operators=2).calls(rotary.ROTARY)) == 2


def test_sizes_may_change_from_call_to_call() -> None:
    def drawn(length: int) -> list[Tensor]:
        states = torch.randn(2, BATCH, length, HEADS * SIZE, dtype=torch.float64)
        angles = torch.rand(BATCH, length, SIZE, dtype=torch.float64)
        return [*(t.clone().requires_grad_() for t in states), angles.cos(), angles.sin()]

    assert_is_fused_at_any_length(attention(turned), drawn, "fuse_rotary", 2)


def test_inference_is_served_too() -> None:
    args = draw()
    fused = Fused(attention(turned), "fuse_rotary")
    with torch.no_grad():
        torch.testing.assert_close(fused(*args), attention(turned)(*args))
    assert fused.rewrites == 2


def test_the_cpu_is_left_alone_unless_it_is_named() -> None:
    report = memopt.explain(
        attention(turned), *draw(), options={"lowering": "eager", "passes": {"fuse_rotary": True}}
    )
    (graph,) = report.graphs
    assert graph.rewrites["fuse_rotary"] == 0
    assert not [r for r in graph.remarks if r.pass_name == "fuse_rotary"]


def read_elsewhere(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    rotated = rotate_half(x)
    return x * cos + rotated * sin + rotated.tanh()


def overwritten(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    own = x.detach() * 1
    rotated = rotate_half(own)
    own.mul_(2)
    return own * cos + rotated * sin + x


NEAR: dict[str, tuple[Turn, str]] = {
    "read elsewhere": (read_elsewhere, "is also read by"),
    "complex numbers of another kind": (
        lambda x, cos, sin: complex_numbers(x, cos, sin, reverse=True),
        "no spelling of a rotary embedding",
    ),
    "overwritten": (overwritten, "overwrites an input"),
    "a table for each head": (
        lambda x, cos, sin: turned(x, cos.expand(-1, HEADS, -1, -1), sin.expand(-1, 3, -1, -1)),
        "one row for each position",
    ),
    "one number for each position": (
        lambda x, cos, sin: turned(x, cos[..., :1], sin[..., :1]),
        "tables have 1 entries",
    ),
    "no sign": (
        lambda x, cos, sin: x * cos + torch.cat((x[..., 4:], x[..., :4]), -1) * sin,
        "",
    ),
    "unequal parts": (
        lambda x, cos, sin: x * cos + torch.cat((-x[..., 3:], x[..., :3]), -1) * sin,
        "",
    ),
    "another tensor": (lambda x, cos, sin: x * cos + rotate_half(x.sin()) * sin, ""),
    "a difference": (lambda x, cos, sin: x * cos - rotate_half(x) * sin, ""),
}


@pytest.mark.parametrize("form", NEAR)
def test_what_looks_like_a_rotation_stays_and_says_why(form: str) -> None:
    function, why = NEAR[form]
    is_left(attention(function), draw(), why=why)


def test_tables_that_are_trained_stay() -> None:
    inputs: Sequence[Tensor] = [t.detach().requires_grad_() for t in draw()]
    is_left(attention(turned), inputs, why="the tables have a gradient")


def test_the_remark_tells_the_spelling() -> None:
    fused = Fused(attention(of_a_part), "fuse_rotary")
    fused(*draw(PART))
    assert all("of a part" in remark.text for remark in fused.said(RemarkKind.APPLIED))
