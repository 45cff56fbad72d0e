"""Where a graph shows that a table holds each angle twice, the operator reads each once."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from memopt.kernels import rotary
from memopt.remarks import RemarkKind
from tests.passes.compiling import argument
from tests.passes.fusing import assert_is_fused
from tests.passes.rotary_forms import (
    BATCH,
    LENGTH,
    SIZE,
    draw,
    heads,
    rotate_half,
    rotate_pairs,
    turned,
)

Make = Callable[[Tensor], Sequence[Tensor]]
is_fused = partial(assert_is_fused, pass_name="fuse_rotary")


def made_of(make: Make, rotate: Any = rotate_half) -> Any:
    """Scores whose tables `(BATCH, LENGTH, SIZE)` are made of angles in the same graph."""

    def scores(q: Tensor, k: Tensor, angles: Tensor) -> Tensor:
        cos, sin = (t.unsqueeze(1) for t in make(angles))
        own = turned(heads(q), cos, sin, rotate), turned(heads(k), cos, sin, rotate)
        return own[0] @ own[1].transpose(2, 3)

    return scores


def angles_drawn(dtype: torch.dtype = torch.float32) -> list[Tensor]:
    q, k, *_ = draw(dtype=dtype)
    return [q, k, torch.rand(BATCH, LENGTH, SIZE // 2) * 6]


def both(angles: Tensor) -> tuple[Tensor, Tensor]:
    return angles.cos(), angles.sin()


def as_llama(angles: Tensor) -> tuple[Tensor, Tensor]:
    twice = torch.cat((angles, angles), dim=-1)
    cos, sin = twice.cos() * 1.25, twice.sin() * 1.25
    return cos.to(dtype=torch.bfloat16), sin.to(dtype=torch.bfloat16)


def as_glm(angles: Tensor) -> list[Tensor]:
    tables = both(torch.cat((angles, angles), dim=-1))
    return [t[..., : SIZE // 2].repeat_interleave(2, dim=-1) for t in tables]


def of_positions(angles: Tensor) -> tuple[Tensor, Tensor]:
    one = angles[0]
    return both(torch.cat([one, one], -1)[None, :])


TWICE: dict[str, tuple[Make, Any]] = {
    "Llama": (as_llama, rotate_half),
    "repeated": (lambda a: both(a.repeat(1, 1, 2)), rotate_half),
    "tiled behind": (lambda a: [torch.tile(t, (1, 1, 2)) for t in both(a)], rotate_half),
    "of positions": (of_positions, rotate_half),
    "scaled by a tensor": (
        lambda a: [a.mean() * t for t in both(torch.cat([a, a], -1))],
        rotate_half,
    ),
    "Cohere": (lambda a: both(torch.repeat_interleave(a, 2, dim=-1)), rotate_pairs),
    "GLM": (as_glm, rotate_pairs),
    "stacked": (lambda a: both(torch.stack((a, a), dim=-1).flatten(-2)), rotate_pairs),
}


@pytest.mark.parametrize("form", TWICE)
def test_a_table_that_is_made_of_each_angle_twice_is_half_as_wide(form: str) -> None:
    make, rotate = TWICE[form]
    fused = is_fused(made_of(make, rotate), angles_drawn, operators=2)
    (call,) = fused.calls(rotary.ROTARY)
    for name in ("cos", "sin"):
        table = argument(call, name).meta["example_value"]
        assert table.shape[-1] == SIZE // 2
        assert table.stride(-1) == 1
    assert all("each angle once" in remark.text for remark in fused.said(RemarkKind.APPLIED))


def written_into(angles: Tensor) -> tuple[Tensor, Tensor]:
    cos, sin = both(torch.cat((angles, angles), dim=-1))
    cos[..., 0] = 0.5
    return cos, sin


def written_behind(angles: Tensor) -> tuple[Tensor, Tensor]:
    angles = angles * 1
    cos, sin = both(torch.cat((angles, angles), dim=-1))
    angles.zero_()
    return cos, sin


def shifted(angles: Tensor) -> list[Tensor]:
    return [t + torch.arange(SIZE) / SIZE for t in both(torch.cat((angles, angles), dim=-1))]


WHOLE: dict[str, tuple[Make, Any]] = {
    "two kinds of angles": (lambda a: both(torch.cat((a, a * 2), -1)), rotate_half),
    "in another order": (lambda a: both(torch.cat((a, a), -1)), rotate_pairs),
    "in the other order": (lambda a: both(torch.repeat_interleave(a, 2, -1)), rotate_half),
    "one of both": (
        lambda a: (torch.cat((a, a), -1).cos(), torch.cat((a, a * 2), -1).sin()),
        rotate_half,
    ),
    "written into": (written_into, rotate_half),
    "written behind": (written_behind, rotate_half),
    "shifted": (shifted, rotate_half),
    "turned round": (lambda a: [t.flip(-1) for t in both(torch.cat((a, a), -1))], rotate_half),
}


@pytest.mark.parametrize("form", WHOLE)
def test_a_table_that_may_hold_other_angles_is_read_as_it_is(form: str) -> None:
    make, rotate = WHOLE[form]
    fused = is_fused(made_of(make, rotate), angles_drawn, operators=2)
    (call,) = fused.calls(rotary.ROTARY)
    assert argument(call, "cos").meta["example_value"].shape[-1] == SIZE
