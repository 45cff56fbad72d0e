"""The case of attention with spans: its rows, and its table."""

import json

from bench.attention import CASE, SINKS, attention_section, run


def test_every_peer_has_times_and_scratch_and_ours_is_least() -> None:
    said: list[str] = []
    rows = run("cpu", said.append, lengths=(512,), rounds=1, compiled=False)
    assert rows == json.loads(json.dumps(rows))
    assert [row["peer"] for row in rows] == ["memopt", "causal", "dense mask"]
    assert len(said) == len(rows)
    assert all(row["case"] == CASE and set(row["seconds"]) == {"forward", "both"} for row in rows)
    scratch = {row["peer"]: row["scratch_bytes"] for row in rows}
    assert scratch["memopt"] < scratch["dense mask"]
    assert 0 < rows[0]["share"] < 1
    assert SINKS < 512
    table = attention_section(rows)
    assert table.count("\n| ") == 2 + len(rows)
    assert "dense mask, N = 512" in table


def test_other_rows_have_no_table() -> None:
    assert attention_section([{"kind": "step"}]) == ""
