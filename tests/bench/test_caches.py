"""The case of caches: its rows, and its table."""

import json
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from torch.testing._internal.two_tensor import TwoTensor

from bench.caches import (
    CASE,
    HEADS,
    KV_HEADS,
    LAYERS,
    WIDTH,
    Row,
    caches_section,
    run,
    stored_bytes,
)
from bench.plot import write_all
from bench.results import header, save

PROMPT, NEW = 512, 3


@pytest.fixture(scope="module")
def rows() -> list[Row]:
    said: list[str] = []
    rows = run("cpu", said.append, prompt=PROMPT, new=NEW)
    assert len(said) == len(rows)
    return rows


def test_every_cache_has_bytes_times_and_tokens(rows: list[Row]) -> None:
    assert rows == json.loads(json.dumps(rows))
    measured = {row["peer"]: row for row in rows if row["status"] == "ok"}
    assert all(row["case"] == CASE and row["seconds"] > 0 for row in measured.values())
    token_bytes = 2 * LAYERS * KV_HEADS * WIDTH * 4
    assert HEADS > KV_HEADS
    whole = measured["DynamicCache"]
    assert whole["device_bytes"] == (PROMPT + NEW - 1) * token_bytes
    counters = 8 * LAYERS
    assert measured["StaticCache"]["device_bytes"] == (PROMPT + NEW) * token_bytes + counters
    host = measured["memopt HostCache"]
    assert host["host_bytes"] == (PROMPT + NEW) * token_bytes
    assert host["device_bytes"] < whole["device_bytes"] / 3
    for name in ("memopt HeadSpanCache", "memopt EvictingCache"):
        assert measured[name]["device_bytes"] < 0.7 * whole["device_bytes"]


def test_caches_that_lose_nothing_lead_to_the_same_tokens(rows: list[Row]) -> None:
    same = {row["peer"]: row.get("same") for row in rows}
    exact = ("DynamicCache", "StaticCache", "memopt HostCache")
    assert [same[name] for name in exact] == [1.0] * 3


@pytest.mark.skipif(find_spec("optimum") is not None, reason="the library is there")
def test_a_cache_whose_library_is_not_there_says_so(rows: list[Row]) -> None:
    row = next(row for row in rows if "quanto" in row["peer"])
    assert row["status"] == "skipped"
    assert "optimum-quanto" in row["error"]


def test_a_storage_is_counted_once_and_parts_of_tensors_are_found() -> None:
    class Layer:
        def __init__(self) -> None:
            self.keys = torch.zeros(8)
            self.values = self.keys[2:]
            self.codes = TwoTensor(torch.zeros(3), torch.zeros(3))  # type: ignore[no-untyped-call]

    layer = Layer()
    assert stored_bytes([layer, {"twice": layer}]) == 4 * (8 + 3 + 3)


def test_the_page_has_a_table_of_them(rows: list[Row], tmp_path: Path) -> None:
    save(tmp_path / "cpu_caches.json", header(0, "cpu"), rows)
    write_all([tmp_path / "cpu_caches.json"], tmp_path)
    page = (tmp_path / "docs" / "results.md").read_text()
    assert "### caches" in page
    table = page[page.index("| cache |") :]
    assert table.count("\n| ") == 1 + len(rows)
    assert f"prompt of {PROMPT}" in page


def test_other_rows_have_no_table() -> None:
    assert caches_section([{"kind": "step"}]) == ""
