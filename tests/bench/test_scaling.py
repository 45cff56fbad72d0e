"""The computed case: its formulas by hand, its rows for a small model, and a measured peak."""

import dataclasses
import math
from collections.abc import Iterator
from pathlib import Path

import pytest

from bench import scaling
from bench.__main__ import main
from bench.scaling import Model, run
from bench.sharding import Fabric, Part, Training
from memopt.device import DEVICES
from tests.distributed_models import WIDTH, sharded_step
from tests.ranks import Ranks, ranks

SMALL = Model(
    "small",
    {
        "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4,
        "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 1024,
    },
    batch=2,
    length=512,
)  # fmt: skip
BLOCK = Part(
    parameters=1000,
    peak_bytes=50_000,
    held_bytes=40_000,
    forward_seconds=1.0,
    backward_seconds=2.0,
)
HEAD = Part(
    parameters=500, peak_bytes=20_000, held_bytes=0, forward_seconds=0.5, backward_seconds=0.75
)
TRAINING = Training(blocks=3, embedding=500)


def test_a_ring_passes_on_all_but_a_ranks_own_share() -> None:
    fabric = Fabric(node=2, inner=100.0, outer=40.0, inner_hop_seconds=0.01, outer_hop_seconds=0.5)
    assert fabric.ring_seconds(1000, 1) == 0
    assert fabric.ring_seconds(1000, 2) == pytest.approx(1000 * 1 / 2 / 100 + 0.01)
    # Two nodes, of whose cards both carry the ring: 80 bytes a second; two of three hops cross.
    assert fabric.ring_seconds(1000, 4) == pytest.approx(1000 * 3 / 4 / 80 + 2 * 0.5 + 0.01)


def test_a_ranks_bytes_are_its_shards_what_is_gathered_and_the_highest_graph() -> None:
    parameters = 3 * 1000 + 500 + 500
    assert TRAINING.sharded_bytes(BLOCK, HEAD, 4) == 16 * parameters / 4
    assert TRAINING.gathered_bytes(BLOCK, HEAD) == 2 * (2 * 1000 + 500 + 500)
    around = 16_000 + 6_000 + 4 * 1000
    assert TRAINING.around_bytes(BLOCK, HEAD, 4) == around
    assert TRAINING.rank_bytes(BLOCK, HEAD, 4) == around + 20_000 + 40_000  # in the head
    small = Part(
        parameters=500, peak_bytes=9_000, held_bytes=0, forward_seconds=0, backward_seconds=0
    )
    assert TRAINING.rank_bytes(BLOCK, small, 4) == around + 50_000  # in a block


@pytest.mark.parametrize(
    ("bandwidth", "forward", "backward"), [(math.inf, 1.0, 2.0), (1000.0, 1.0, 3.0)]
)
def test_a_step_is_blocks_beside_their_collectives(
    bandwidth: float, forward: float, backward: float
) -> None:
    """Two ranks: a block's 2000 bytes are gathered in 1 s, and 4000 reduced in 2, if at all."""
    fabric = Fabric(inner=bandwidth, inner_hop_seconds=0)
    gather, reduce = 1000 / bandwidth, 2000 / bandwidth
    edges = 2 * gather + 2 * reduce  # what is in no block has as many parameters as one
    expected = edges + 3 * (forward + backward) + 1.25
    assert TRAINING.step_seconds(BLOCK, HEAD, 2, fabric) == pytest.approx(expected)


@pytest.mark.parametrize("budget", [None, "min"])
def test_the_bytes_are_those_of_two_ranks(two: Ranks, budget: str | None) -> None:
    """Of blocks alone, in float32: what is gathered, reduced and planned."""
    blocks, options = 4, {"lowering": "eager", "memory_budget": budget}
    for peak, planned, parameters in two.run(sharded_step, blocks, 4, 256, options):
        block = Part(
            parameters=parameters,
            peak_bytes=planned,
            held_bytes=0,
            forward_seconds=0,
            backward_seconds=0,
        )
        training = Training(blocks=blocks, embedding=0, width_bytes=4, state_bytes=0)
        nothing = dataclasses.replace(block, parameters=0, peak_bytes=0)
        computed = training.rank_bytes(block, nothing, 2)
        # No one holds the last result here, and where little is kept one block is gathered.
        spared = 4 * (4 * 256 * WIDTH + parameters)
        assert computed - 1.05 * spared <= peak <= 1.01 * computed


@pytest.fixture(scope="module")
def two() -> Iterator[Ranks]:
    with ranks(2) as started:
        yield started


@pytest.fixture(scope="module")
def rows() -> list[scaling.Row]:
    return run(lambda line: None, [SMALL], (8, 64))


def test_more_ranks_hold_less_each_and_the_plans_are_ordered(rows: list[scaling.Row]) -> None:
    by = {(row["peer"], row["ranks"]): row for row in rows}
    assert len(by) == 6
    for way in scaling.WAYS:
        few, many = by[way, 8], by[way, 64]
        assert many["sharded_bytes"] == pytest.approx(few["sharded_bytes"] / 8, abs=1)
        assert many["gathered_bytes"] == few["gathered_bytes"]
        assert few["fits"]
        assert many["tokens_per_second"] > few["tokens_per_second"]
    assert by["checkpoint", 8]["graph_bytes"] < by["stock", 8]["graph_bytes"]
    assert by["checkpoint", 8]["recompute_seconds"] > by["stock", 8]["recompute_seconds"]
    # There is room for all of it, so nothing is run twice.
    assert by["memopt", 8]["recompute_seconds"] <= by["stock", 8]["recompute_seconds"]


def test_where_stock_does_not_fit_the_plan_takes_what_is_left(
    rows: list[scaling.Row], monkeypatch: pytest.MonkeyPatch
) -> None:
    by = {row["peer"]: row for row in rows if row["ranks"] == 8}
    lowest, highest = by["checkpoint"]["rank_bytes"], by["stock"]["rank_bytes"]
    room = (lowest + highest) // 2
    monkeypatch.setattr(scaling, "USABLE", room / DEVICES["h100"].memory_bytes)
    tight = {row["peer"]: row for row in run(lambda line: None, [SMALL], (8,))}
    assert not tight["stock"]["fits"]
    assert tight["memopt"]["fits"]
    assert tight["memopt"]["rank_bytes"] <= room
    assert tight["memopt"]["recompute_seconds"] < by["checkpoint"]["recompute_seconds"]


def test_the_command_writes_results_page_and_picture(
    rows: list[scaling.Row], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scaling, "run", lambda say: rows)
    out = tmp_path / "scaling.json"
    assert main(["scaling", "--out", str(out), "--root", str(tmp_path)]) == 0
    page = (tmp_path / "docs" / "scaling.md").read_text()
    assert (tmp_path / "docs" / "assets" / "scaling.png").stat().st_size > 0
    table = page[page.index("| ranks | way") :]
    assert table.count("\n| ") == 1 + len(rows)
    assert "{" not in page


def test_a_page_of_the_committed_results_is_the_committed_page() -> None:
    from bench.results import load
    from bench.scaling_page import page

    root = Path(__file__).parents[2]
    results = load(root / "bench" / "results" / "scaling.json")
    assert page(results, "assets/scaling.png") == (root / "docs" / "scaling.md").read_text()
