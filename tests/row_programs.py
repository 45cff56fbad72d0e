"""Random programs over rows as data: pointwise operators, sums of rows and of groups, broadcasts.

As ``tests.graphs``, for graphs that fused regions are made of. Each step reads two earlier values;
operators keep numbers near 1, so that no error is lost under a large one.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from hypothesis import strategies as st
from torch import Tensor

from tests.row_functions import bits, wide

GROUP = 8


def _group_scale(x: Tensor) -> Tensor:
    groups = x.reshape(*x.shape[:-1], -1, GROUP)
    return (groups / (groups.abs().amax(-1, keepdim=True) + 1)).reshape(x.shape)


STEPS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "add": lambda x, y: (x + y) / 2,
    "sub": lambda x, y: x - 0.5 * y,
    "mul": lambda x, y: x * torch.tanh(y),
    "div": lambda x, y: x / (1 + y * y),
    "sigmoid": lambda x, y: 2 * x.sigmoid() - y,
    "exp": lambda x, y: (-x.abs()).exp() + y,
    "relu": lambda x, y: x.relu() + 0.1 * y,
    "larger": torch.maximum,
    "clamp": lambda x, y: x.clamp(-1.5, 1.5) + 0.1 * y,
    "select": lambda x, y: torch.where(y > 0, x, -x),
    "centre": lambda x, y: x - x.mean(-1, keepdim=True),
    "unit": lambda x, y: x * torch.rsqrt(x.var(-1, correction=0, keepdim=True) + 0.1),
    "rms": lambda x, y: x * torch.rsqrt(x.pow(2).mean(-1)[..., None] + 0.1),
    "shift": lambda x, y: x - y.amax(-1, keepdim=True) / 4,
    "share": lambda x, y: x * (1 + y.abs()).sum(-1, keepdim=True) / (2 * x.shape[-1]),
    "groups": lambda x, y: _group_scale(x) + y,
    "flat": lambda x, y: x.reshape(-1, x.shape[-1]).tanh().reshape(x.shape) + y,
}
INPUTS = ("x", "y", "row", "weight", "scale")


@dataclass(frozen=True)
class RowFunction:
    """A straight line of steps; the last values are returned, and what is made of the very last.

    Attributes:
        steps: operator and the positions of its two inputs among the values so far.
        outputs: how many of the last values are returned.
        packed: whether the signs of the last value are returned as bits.
        int8: whether the last value is returned as int8 with a scale for each row.
    """

    steps: tuple[tuple[str, int, int], ...]
    outputs: int = 1
    packed: bool = False
    int8: bool = False

    def __call__(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        x, y, row, weight, scale = inputs
        values = [wide(x), wide(y), wide(x) * wide(row)[..., None], wide(y) + wide(weight)]
        values[1] = values[1] * wide(scale)
        for name, left, right in self.steps:
            values.append(STEPS[name](values[left], values[right]))
        results = [v.to(x.dtype) for v in values[-self.outputs :]]
        last = values[-1]
        if self.packed:
            results.append(bits(last > 0))
        if self.int8:
            size = last.abs().amax(-1, keepdim=True) + 0.01
            results += [torch.round(last / size * 127).to(torch.int8), size]
        return tuple(results)

    def inputs(self, dtype: torch.dtype, rows: tuple[int, ...], width: int) -> list[Tensor]:
        """Two full tensors, the second one as a slice, one of rows, one of columns, one number."""
        generator = torch.Generator().manual_seed(3)
        shapes = [(*rows, width), (*rows, width + 8), rows, (width,), ()]
        drawn = [torch.randn(s, generator=generator).to(dtype) for s in shapes]
        drawn[1] = drawn[1][..., 8:]
        return drawn


@st.composite
def row_functions(
    draw: st.DrawFn, *, names: Iterable[str] = tuple(STEPS), most: int = 7
) -> RowFunction:
    """Functions whose steps mostly read recent values."""
    steps = []
    for position in range(draw(st.integers(1, most))):
        known = 4 + position
        left = draw(st.integers(max(0, known - 3), known - 1))
        right = draw(st.integers(0, known - 1))
        steps.append((draw(st.sampled_from(sorted(names))), left, right))
    outputs = draw(st.integers(1, min(2, len(steps))))
    return RowFunction(tuple(steps), outputs, draw(st.booleans()), draw(st.booleans()))
