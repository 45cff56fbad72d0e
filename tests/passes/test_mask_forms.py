"""What a mask shows, told from its numbers."""

import pytest
import torch
from torch import Tensor

from memopt.passes.mask_forms import form_of, shows_something

N = 12
AT = torch.arange(N)
CAUSAL = AT[None] <= AT[:, None]
DOCUMENT = torch.tensor([0] * 5 + [1] * 3 + [2] * 4)
SAME = DOCUMENT[None] == DOCUMENT[:, None]


def near(width: int) -> Tensor:
    return CAUSAL & (AT[None] > AT[:, None] - width)


@pytest.mark.parametrize(
    ("mask", "name", "width", "blocks", "is_causal"),
    [
        (torch.ones(N, N, dtype=torch.bool), "whole", 0, 0, False),
        (torch.zeros(1, 1, 1, N), "whole", 0, 0, False),
        (CAUSAL, "causal", 0, 0, True),
        (near(4), "window", 4, 0, True),
        (near(1), "window", 1, 0, True),
        (near(3) | near(3).T, "window", 3, 0, False),
        (SAME & CAUSAL, "documents", 0, 3, True),
        (SAME.expand(2, 1, N, N), "documents", 0, 3, False),
        (SAME & near(2), "", 0, 0, False),
        (CAUSAL[-3:], "", 0, 0, False),
        (CAUSAL.tril(-1), "", 0, 0, False),
        (torch.zeros(N, N, dtype=torch.bool), "", 0, 0, False),
        (SAME.roll(1, 1), "", 0, 0, False),
    ],
)
def test_forms_are_told_apart(
    mask: Tensor, name: str, width: int, blocks: int, is_causal: bool
) -> None:
    added = (
        torch.zeros(mask.shape).masked_fill(~mask, -torch.inf)
        if mask.dtype == torch.bool
        else mask
    )
    for one in (mask, added):
        form = form_of(one)
        assert (form.name, form.width, form.blocks) == (name, width, blocks)
        assert form.is_causal == is_causal
        assert form.text


@pytest.mark.parametrize("lowest", [-torch.inf, torch.finfo(torch.float32).min])
def test_what_hides_is_the_least_number(lowest: float) -> None:
    assert form_of(torch.full((N, N), lowest).triu(1)).name == "causal"
    assert form_of(torch.full((N, N), -1e4).triu(1)).name == ""


def test_documents_differ_by_sequence() -> None:
    other = DOCUMENT.flip(0).sort().values
    both = torch.stack([SAME, other[None] == other[:, None]])[:, None]
    assert form_of(both).name == "documents"


def test_numbers_that_weigh_keys_have_no_form() -> None:
    assert form_of(torch.full((N, N), -torch.inf).triu(1) + 0.5).name == ""


def test_a_row_of_hidden_keys_alone_is_seen() -> None:
    assert shows_something(CAUSAL)
    assert not shows_something(CAUSAL.tril(-1))
    hidden = torch.zeros(N, N).masked_fill(~CAUSAL, torch.finfo(torch.float32).min)
    assert shows_something(hidden)
    hidden[3] = -1e5
    assert not shows_something(hidden)
    assert not shows_something(torch.full((2, 2), torch.nan))
