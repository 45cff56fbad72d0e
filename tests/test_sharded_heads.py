"""Heads of which each rank has the weight of some classes: chunks of the rank's own logits."""

from collections.abc import Iterator, Mapping

import pytest
import torch

from tests.ranks import Ranks, ranks
from tests.sharded_heads import (
    Layout,
    assert_chunked,
    assert_rounds_as_eager,
    capped_and_shifted,
    error_of_a_class_that_no_rank_has,
    log_probabilities,
    mean,
    normalised_by_hand,
    numbered_from_behind,
    remarks_of,
    smoothed,
    total_of_some,
    weighted,
    with_z_loss,
)

LAYOUTS: Mapping[str, Layout] = {
    "in parts": Layout(mean, gathered=False),
    "in parts, of parts of the rows": Layout(
        total_of_some, gathered=False, rows=True, labels=True
    ),
    "gathered": Layout(mean, bias=True),
    "gathered, of parts of the rows": Layout(with_z_loss, rows=True),
    "weights of classes": Layout(weighted, bias=True),
    "steps between": Layout(capped_and_shifted),
    "log-probabilities": Layout(log_probabilities),
    "classes from the last": Layout(numbered_from_behind),
}


@pytest.fixture(scope="module")
def two() -> Iterator[Ranks]:
    with ranks(2) as started:
        yield started


def test_a_rank_never_has_the_logits_of_its_classes(two: Ranks) -> None:
    two.run(assert_chunked, LAYOUTS)


def test_four_ranks_have_parts_of_different_sizes() -> None:
    uneven = {
        "in parts": Layout(total_of_some, gathered=False, classes=1021),
        "gathered": Layout(log_probabilities, rows=True, bias=True, classes=1021),
    }
    with ranks(4) as four:
        four.run(assert_chunked, uneven)


def test_low_precision_is_no_less_exact_than_eager(two: Ranks) -> None:
    two.run(assert_rounds_as_eager, Layout(mean), torch.float32)
    two.run(assert_rounds_as_eager, Layout(mean), torch.bfloat16)


def test_a_class_that_no_rank_has_is_an_error_on_each(two: Ranks) -> None:
    errors = two.run(error_of_a_class_that_no_rank_has, Layout(mean))
    assert all("is out of bounds" in error for error in errors)


def test_what_cannot_be_done_of_shards_is_left_alone(two: Ranks) -> None:
    layouts = {
        Layout(smoothed): "a loss reads more than its targets' logits",
        Layout(normalised_by_hand): "the logits are also read by",
        Layout(mean, returned=True): "the head is distributed, and its logits are returned",
    }
    for said in two.run(remarks_of, list(layouts)):
        assert all(r in text for r, text in zip(layouts.values(), said, strict=True)), said


def test_logits_that_are_returned_and_not_wanted_are_none(two: Ranks) -> None:
    layouts = [Layout(mean, returned=True), Layout(mean, gathered=False, returned=True)]
    for said in two.run(remarks_of, layouts, "none"):
        assert all("on this rank; returned logits: none" in text for text in said), said
