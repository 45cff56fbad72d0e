"""What a compiled graph returns in place of logits that its losses no longer need."""

from dataclasses import dataclass, field
from typing import Any

import torch

from memopt.lazy.logits import LazyLogits, Usage
from memopt.pipeline import Compiled


@dataclass(frozen=True)
class ReturnedLogits:
    """Turns returned hidden states into ``LazyLogits``.

    Attributes:
        places: which results they are.
        weight, bias: which arguments hold the head.
        product_dtype: of the head's product.
        dtype: of the logits.
        scale, softcap: see ``LazyLogits``.
        detached: whether no gradient flows back from them.
    """

    places: tuple[int, ...]
    weight: int
    bias: int | None
    product_dtype: torch.dtype
    dtype: torch.dtype
    scale: float
    softcap: float
    detached: bool
    usage: Usage = field(default_factory=Usage, compare=False)

    def wrap(self, compiled: Compiled) -> Compiled:
        """``compiled``, with lazy logits among its results."""

        def run(*args: Any) -> Any:
            results = list(compiled(*args))
            for place in self.places:
                lazy = LazyLogits(
                    results[place],
                    args[self.weight],
                    None if self.bias is None else args[self.bias],
                    scale=self.scale,
                    softcap=self.softcap,
                    dtype=self.dtype,
                    product_dtype=self.product_dtype,
                    usage=self.usage,
                )
                results[place] = lazy.detach() if self.detached else lazy
            return tuple(results)

        return run


@dataclass(frozen=True)
class Similarities:
    """What is known of one matrix of similarities ``hidden @ weight.T``.

    Attributes:
        hidden, weight: which results its factors are; the first is to become the matrix.
        product_dtype, dtype: of the product and of the similarities.
        detached: whether no gradient flows back from them.
    """

    hidden: int
    weight: int
    product_dtype: torch.dtype
    dtype: torch.dtype
    detached: bool
    usage: Usage = field(default_factory=Usage, compare=False)


@dataclass(frozen=True)
class ReturnedSimilarities:
    """Turns returned embeddings into ``LazyLogits``; both factors are activations.

    Attributes:
        matrices: the similarities.
        extra: how many of the last results are there for these alone.
    """

    matrices: tuple[Similarities, ...]
    extra: int

    def wrap(self, compiled: Compiled) -> Compiled:
        """``compiled``, with lazy similarities among its results."""

        def run(*args: Any) -> Any:
            given = compiled(*args)
            results = list(given[: len(given) - self.extra])
            for m in self.matrices:
                lazy = LazyLogits(
                    given[m.hidden],
                    given[m.weight],
                    dtype=m.dtype,
                    product_dtype=m.product_dtype,
                    usage=m.usage,
                )
                results[m.hidden] = lazy.detach() if m.detached else lazy
            return tuple(results)

        return run
