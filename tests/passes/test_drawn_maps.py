"""Graphs that are drawn at random, cut into rows of their maps: the same numbers."""

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from memopt.passes import CUT_MAPS
from memopt.passes.map_moves import write_in_place
from tests.passes.map_graphs import (
    traced,
    whole_numbers,
)


class Drawn(nn.Module):
    """A graph of some operators on maps, drawn; it returns several of its values."""

    def __init__(self, rng: random.Random) -> None:
        super().__init__()
        self.weights = nn.ParameterList()
        self.steps: list[Callable[[list[Tensor]], Tensor]] = []
        for _ in range(rng.randint(3, 9)):
            self.steps.append(self.draw(rng))
        self.returned = rng.sample(range(1, len(self.steps) + 1), k=min(2, len(self.steps)))

    def draw(self, rng: random.Random) -> Callable[[list[Tensor]], Tensor]:
        """One operator of earlier values, the last among them most often."""
        back = rng.choice([1, 1, 1, 2, 3])
        kernel, stride, dilation = rng.randint(1, 4), rng.choice([1, 1, 2]), rng.choice([1, 1, 2])
        padding = rng.randint(0, min(3, dilation * (kernel - 1)))
        number = len(self.weights)

        def source(values: list[Tensor]) -> Tensor:
            return values[-min(back, len(values))]

        def convolution(values: list[Tensor]) -> Tensor:
            weight = self.weights[number]
            return F.conv2d(source(values), weight, None, stride, padding, dilation)

        def transposed(values: list[Tensor]) -> Tensor:
            return F.conv_transpose2d(source(values), self.weights[number], None, stride, padding)

        def pair(values: list[Tensor]) -> Tensor:
            x = source(values)
            alike = [value for value in values if value.shape == x.shape]
            return x + alike[0]

        def both(values: list[Tensor]) -> Tensor:
            x = source(values)
            alike = [value for value in values if value.shape == x.shape]
            return torch.cat([alike[0][:, 1:3], x[:, :2]], 1)

        def centred(values: list[Tensor]) -> Tensor:
            groups = source(values).reshape(1, 2, 2, -1)
            return (groups - groups.amax((2, 3), keepdim=True)).reshape(source(values).shape)

        unary: list[Callable[[Tensor], Tensor]] = [
            F.relu,
            lambda x: F.interpolate(x, scale_factor=2.0) if x.shape[2] < 60 else x,
            lambda x: F.max_pool2d(x, 3, 2, 1) if x.shape[2] > 20 else x,
            lambda x: x - x.amax((2, 3), keepdim=True),
            lambda x: torch.cat([*x.reshape(1, 2, 2, *x.shape[2:]).unbind(2)], 1),
            lambda x: x.permute(0, 2, 3, 1).matmul(torch.ones(4, 4)).permute(0, 3, 1, 2),
            lambda x: F.pad(x, (1, 1, 2, 2), mode="reflect"),
            lambda x: x.transpose(2, 3).contiguous().transpose(2, 3) * 2,
        ]
        alone = rng.choice(unary)
        choices = [convolution, convolution, transposed, pair, both, centred]
        chosen = rng.choice([*choices, lambda values: alone(source(values))])
        if chosen in (convolution, transposed):
            self.weights.append(torch.empty(4, 4, kernel, kernel))
        return chosen

    def forward(self, x: Tensor) -> Any:
        values = [x]
        for step in self.steps:
            values.append(step(values))
        return [values[i] for i in self.returned]


@pytest.mark.parametrize("seed", range(60))
def test_drawn_graphs_give_the_same_numbers(seed: int) -> None:
    rng = random.Random(seed)
    module, x = whole_numbers(Drawn(rng), torch.empty(1, 4, rng.choice([24, 32, 41]), 24))
    gm, run = traced(module, x)
    expected = run(x)
    drawn = {name: rng.choice([0, 2, 4, 8]) for name in CUT_MAPS(gm.graph, {})}
    CUT_MAPS(gm.graph, {name: pieces for name, pieces in drawn.items() if pieces})
    write_in_place(gm.graph)
    for one, other in zip(run(x), expected, strict=True):
        assert torch.equal(one, other)
