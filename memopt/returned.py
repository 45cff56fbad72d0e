"""What a compiled graph returns in place of logits that its losses no longer need."""

from dataclasses import dataclass, field
from typing import Any

import torch

from memopt.lazy_logits import LazyLogits, Usage
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
