"""The case of sharded blocks: peaks and losses of two ranks, and its table."""

import json
from pathlib import Path

import pytest

from bench.fsdp2 import CASE, Row, fsdp2_section, run
from bench.plot import write_all
from bench.results import header, save
from bench.sharded_rank import Setting

SETTING = Setting(model="llama", size="tiny", rounds=1, options={"lowering": "eager"})
PEERS = ("eager", "memopt", "memopt @ half of inductor", "memopt min")


@pytest.fixture(scope="module")
def rows() -> list[Row]:
    said: list[object] = []
    rows = run("cpu", said.append, setting=SETTING, peers=PEERS)
    assert len(said) + 1 == len(rows) == len(PEERS)
    return rows


def test_every_rank_trains_as_eager_does_with_a_lower_peak(rows: list[Row]) -> None:
    assert rows == json.loads(json.dumps(rows))
    by_peer = {row["peer"]: row for row in rows}
    assert [row["status"] for row in rows] == ["ok", "ok", "skipped", "ok"], rows
    assert "inductor has no peak" in by_peer["memopt @ half of inductor"]["error"]
    eager = by_peer["eager"]
    assert len(eager["losses"]) == SETTING.world
    assert eager["losses"][0] != eager["losses"][1]  # each rank has a batch of its own
    for row in (row for row in rows if row["status"] == "ok"):
        assert row["loss_error"] < 1e-5
        assert all(seconds > 0 for seconds in row["step_seconds_rounds"])
    for own, theirs in zip(by_peer["memopt min"]["peak_bytes"], eager["peak_bytes"], strict=True):
        assert own < theirs


def test_the_page_has_a_table_of_them(rows: list[Row], tmp_path: Path) -> None:
    stock = rows[0] | {"peer": "inductor"}
    failed = {"kind": CASE, "peer": "memopt 0.5", "status": "failed", "error": "a | b\nc"}
    save(tmp_path / "cpu_fsdp2.json", header(0, "cpu"), [stock, *rows, failed])
    write_all([tmp_path / "cpu_fsdp2.json"], tmp_path)
    page = (tmp_path / "docs" / "results.md").read_text()
    table = page[page.index("| peer | budget of the blocks") :]
    assert table.count("\n| ") == len(rows) + 3
    assert "failed: a \\| b c" in table


def test_other_rows_have_no_table() -> None:
    assert fsdp2_section([{"kind": "step"}]) == ""


def test_too_few_gpus_are_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    assert {row["status"] for row in run("cuda", print)} == {"skipped"}
