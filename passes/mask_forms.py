"""What a mask of `(..., queries, keys)` shows, told from its numbers."""

from dataclasses import dataclass

import torch
from torch import Tensor

WHOLE, CAUSAL, WINDOW = "whole", "causal", "window"


@dataclass(frozen=True)
class Form:
    """The form of a mask.

    Attributes:
        name: ``"whole"`` hides nothing; ``"causal"`` shows each query the keys up to its own;
            ``"window"`` shows the nearest ones of these, or on both sides; ``"documents"`` shows
            keys of the same stretch of positions; ``""`` is none of them.
        text: in words; of a mask without a name, why it is none.
        width: keys that a window has on one side, the query's own included; else 0.
        blocks: documents in the first row of the batch; else 0.
        is_causal: whether no key behind a query's own is shown.
    """

    name: str
    text: str
    width: int = 0
    blocks: int = 0
    is_causal: bool = False


def form_of(mask: Tensor) -> Form:
    """What a mask shows: where it is true, or adds zero.

    What it hides must be false, or add the least number of its dtype or less.

    Args:
        mask: `(..., queries, keys)`, of booleans or of numbers that are added to scores.
    """
    shown = mask if mask.dtype == torch.bool else mask == 0
    if bool(shown.all()):
        return Form(WHOLE, WHOLE)
    if mask.dim() < 2 or mask.shape[-1] != mask.shape[-2]:
        return Form("", "it has another number of queries than of keys")
    if not only_hides(mask):
        return Form("", "it is not causal")
    everything = torch.ones(mask.shape[-2:], dtype=torch.bool)
    causal = everything.tril()
    if bool((shown == causal).all()):
        return Form(CAUSAL, CAUSAL, is_causal=True)
    width = int(shown.flatten(0, -2)[-1].sum())  # of the last query, which sees to one side only
    window = causal.triu(1 - width)
    if width and bool((shown == window).all()):
        return Form(WINDOW, f"a causal window of {width} keys", width, is_causal=True)
    if width and bool((shown == everything.tril(width - 1).triu(1 - width)).all()):
        return Form(WINDOW, f"a window of {width} keys on each side", width)
    return _documents(shown, causal)


def _documents(shown: Tensor, causal: Tensor) -> Form:
    """The form of stretches of positions that do not see one another."""
    start = shown.int().argmax(-1)  # the first key that each query sees
    alike = start[..., :, None] == start[..., None, :]
    first = start.reshape(-1, start.shape[-1])[0]
    blocks = 1 + int((first[1:] != first[:-1]).sum())
    if bool((shown == (alike & causal)).all()):
        text = f"causal within {blocks} documents"
        return Form("documents", text, blocks=blocks, is_causal=True)
    if bool((shown == alike).all()):
        return Form("documents", f"whole within {blocks} documents", blocks=blocks)
    return Form("", "it is not causal")


def only_hides(mask: Tensor) -> bool:
    """Whether a mask hides keys for sure, and does nothing else to scores."""
    if mask.dtype == torch.bool:
        return True
    return bool(((mask == 0) | (mask <= torch.finfo(mask.dtype).min)).all())


def shows_something(mask: Tensor) -> bool:
    """Whether every query sees a key, so that no row of the softmax is one of hidden keys alone.

    A key that a number as large as `1 / sqrt(eps)` is taken from counts as hidden: the rest of
    its score is rounded away.
    """
    if mask.dtype == torch.bool:
        return bool(mask.any(-1).all())
    least = -(torch.finfo(mask.dtype).eps ** -0.5)
    return bool((mask.amax(-1) > least).all()) and not bool(mask.isnan().any())
