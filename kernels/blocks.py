"""Rows that are worked on at a time: chunks, whose logits exist, and blocks that stay in cache."""

from collections.abc import Iterator

import torch

# A block of rows is converted, exponentiated and turned into its gradient while it is in cache.
_BLOCK_BYTES = 8 * 2**20
# Every chunk reads and writes the weight gradient once; with this many rows the products hide it.
_CHUNK_ROWS = {"cpu": 256, "cuda": 2048}


def pieces(rows: int, size: int) -> Iterator[slice]:
    """``range(rows)`` in slices of at most ``size``."""
    for start in range(0, rows, size):
        yield slice(start, min(start + size, rows))


def block_rows(width: int, itemsize: int) -> int:
    """Rows of a block that stays in cache."""
    return max(1, _BLOCK_BYTES // (width * itemsize))


def default_chunk_rows(rows: int, classes: int, device: torch.device) -> int:
    """Rows of a chunk: few enough to be small, enough to keep the products fast.

    Where the classes are so few that more rows fit a block in cache, it takes those too, up to a
    quarter of all. The products may need more; but the logits are never whole.

    Args:
        rows: how many there are in all.
        classes: length of a row.
        device: where the products run.
    """
    fast = _CHUNK_ROWS.get(device.type, _CHUNK_ROWS["cuda"])
    cached = min(block_rows(max(1, classes), 4), rows // 4)
    return max(1, min(-(-rows // 2), max(fast, cached)))
