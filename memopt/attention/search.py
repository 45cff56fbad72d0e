"""Which rule every head of keys gets: the least influence lost, at a bounded density.

For each layer all pairs of rules are tried, with any number of heads at the first of them, and
what another choice beats is dropped. An integer program takes one of the others for each layer,
under the bound at every length.

Source: MoA: Fu et al. (2024), arXiv:2406.14909, which gives all of it to the integer program.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import LinearConstraint, milp
from scipy.sparse import block_diag

from memopt.errors import ConfigError

Numbers = NDArray[np.float64]
Choice = tuple[int, ...]
_MOST_CHOICES = 256  # of a layer, for each way to weigh its lengths


@dataclass(frozen=True, slots=True)
class Candidates:
    """What each rule would cost the heads of one layer.

    Attributes:
        lost: influence, of each rule and head `(R, H)`, from 0 on.
        density: of each rule and length `(R, lengths)`, from 0 to 1.
    """

    lost: Numbers
    density: Numbers

    @property
    def heads(self) -> int:
        """How many."""
        return int(self.lost.shape[1])

    def loss_of(self, choice: Choice) -> float:
        """Influence that is lost."""
        return float(self.lost[list(choice), np.arange(self.heads)].sum())

    def density_of(self, choice: Choice) -> Numbers:
        """Summed over the heads, for each length."""
        summed: Numbers = self.density[list(choice)].sum(0)
        return summed


def choose(layers: Sequence[Candidates], budget: float) -> list[Choice]:
    """The rule of each head of each layer, at most two in a layer.

    Args:
        layers: their candidates.
        budget: on the mean density of all heads, at every length.

    Raises:
        ConfigError: the budget is below the least density of all.
    """
    heads = sum(layer.heads for layer in layers)
    scale = sum(float(layer.lost.max(0).sum()) for layer in layers) or 1.0
    choices = [_choices(layer) for layer in layers]
    losses = np.concatenate(
        [[layer.loss_of(c) for c in own] for layer, own in zip(layers, choices, strict=True)]
    )
    densities = np.concatenate(
        [
            [layer.density_of(c) / heads for c in own]
            for layer, own in zip(layers, choices, strict=True)
        ]
    )
    one_each = block_diag([np.ones((1, len(own))) for own in choices], format="csr")
    solved: Any = milp(
        losses / scale,
        integrality=np.ones(len(losses)),
        bounds=(0, 1),
        constraints=[
            LinearConstraint(one_each, 1, 1),
            LinearConstraint(densities.T, ub=budget),
        ],
        options={"mip_rel_gap": 1e-4, "node_limit": 10_000},
    )
    if solved.x is None:
        least = max(sum(layer.density.min(0) * layer.heads for layer in layers) / heads)
        raise ConfigError(
            f"budget={budget!r}: with these sinks and blocks the least density is {least:.3f} at "
            "some length; raise the budget, or make blocks or sinks smaller"
        )
    picked = [part.argmax() for part in np.split(solved.x, np.cumsum([*map(len, choices)])[:-1])]
    return [own[at] for own, at in zip(choices, picked, strict=True)]


def _choices(layer: Candidates) -> list[Choice]:
    """What is worth considering: no other choice is as sparse and loses less.

    What a pair of rules reads depends on how many heads take the first one alone, and best are
    those that gain most by it.
    """
    lost, density = layer.lost, layer.density
    one, other = np.triu_indices(len(lost))
    gain = lost[other] - lost[one]
    order = np.argsort(-gain, axis=1, kind="stable")
    gained = np.cumsum(np.take_along_axis(gain, order, axis=1), axis=1)
    whole = lost[other].sum(1, keepdims=True)
    losses = np.concatenate([whole, whole - gained], axis=1).ravel()
    count = np.arange(layer.heads + 1)[:, None]
    read = count * density[one, None] + (layer.heads - count) * density[other, None]
    read = read.reshape(losses.size, -1)
    lengths = density.shape[1]
    weights = [np.full(lengths, 1 / lengths), *np.eye(lengths)]
    found: dict[Choice, None] = {}
    for weight in weights[: 1 if lengths == 1 else None]:
        for at in _front(losses, read @ weight):
            pair, taken = divmod(int(at), layer.heads + 1)
            choice = np.full(layer.heads, other[pair])
            choice[order[pair, :taken]] = one[pair]
            found[tuple(choice.tolist())] = None
    return list(found)


def _front(losses: Numbers, read: Numbers) -> NDArray[np.intp]:
    """Those that lose less than all that read as little, the sparsest first; not too many."""
    ranked = np.lexsort((losses, read))
    before = np.minimum.accumulate(losses[ranked])
    better = np.append(True, before[1:] < before[:-1])
    front: NDArray[np.intp] = ranked[better]
    if len(front) <= _MOST_CHOICES:
        return front
    thinned: NDArray[np.intp] = front[
        np.linspace(0, len(front) - 1, _MOST_CHOICES).round().astype(int)
    ]
    return thinned
