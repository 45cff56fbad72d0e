import pytest
import torch

from memopt.kernels.blocks import block_rows, default_chunk_rows, pieces


def test_pieces_cover_every_row_once() -> None:
    rows = [row for part in pieces(10, 4) for row in range(part.start, part.stop)]
    assert rows == list(range(10))
    assert list(pieces(0, 4)) == []


@pytest.mark.parametrize(("device", "expected"), [("cpu", 256), ("cuda", 2048)])
def test_a_large_vocabulary_gets_the_rows_that_keep_the_device_busy(
    device: str, expected: int
) -> None:
    assert default_chunk_rows(100_000, 128_256, torch.device(device)) == expected


def test_few_classes_get_as_many_rows_as_stay_in_cache() -> None:
    assert default_chunk_rows(10**6, 100, torch.device("cpu")) == block_rows(100, 4) > 256


def test_few_classes_do_not_make_the_logits_whole() -> None:
    cpu = torch.device("cpu")
    assert default_chunk_rows(4096, 100, cpu) == 1024
    assert default_chunk_rows(512, 128_256, cpu) == default_chunk_rows(512, 300, cpu) == 256


def test_few_rows_are_two_chunks() -> None:
    assert default_chunk_rows(128, 50_000, torch.device("cpu")) == 64


@pytest.mark.parametrize(("rows", "expected"), [(0, 1), (1, 1), (7, 4)])
def test_a_chunk_has_at_least_one_row(rows: int, expected: int) -> None:
    assert default_chunk_rows(rows, 50_000, torch.device("cpu")) == expected
