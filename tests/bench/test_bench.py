import json
import subprocess
import sys
from collections.abc import Callable
from io import StringIO
from pathlib import Path

import pytest
import torch
from rich.console import Console

from bench import compare, plot, tables
from bench.cases import CASES, DEFAULT, QUICK_CASES, Case
from bench.peers import ALL, CORE, PEERS, QUICK, PeakOf, resolve_budget, with_references
from bench.results import HEADER_KEYS, Row, header, load, save
from bench.runner import run_case
from bench.worker import relative_error
from bench.zoo import MODELS

MIB = 2**20
Write = Callable[..., Path]


@pytest.fixture
def results(tmp_path: Path) -> Write:
    """A results file of one case, all of whose peers worked except one."""

    def write(name: str, scale: float = 1.0) -> Path:
        rows = []
        for index, peer in enumerate(ALL):
            row = Row(case=CASES["lm8"], peer=peer, device="cpu")
            budget = PEERS[peer].memory_budget
            row.memory_budget = 85 * MIB if isinstance(budget, PeakOf) else budget
            row.peak_bytes = int(scale * (200 - 10 * index) * MIB)
            row.predicted_peak_bytes = row.peak_bytes if peer.startswith("memopt") else None
            row.step_seconds, row.cpu_seconds = 1.0 + index / 10, 2.0
            row.first_step_seconds, row.gradient_error = 30.0, 1e-6
            rows.append(row.to_dict())
        rows[-1] |= {"status": "failed", "error": "a | b\nc", "peak_bytes": None}
        for phase, seconds in (("cold", 60.0), ("warm", 6.0)):
            rows.append(
                {"kind": "startup", "case": "s", "peer": "inductor", "phase": phase,
                 "seconds": seconds}
            )  # fmt: skip
        path = tmp_path / name
        save(path, header(0, "cpu"), rows)
        return path

    return write


def test_cases_name_entries_sizes_and_peers_that_exist() -> None:
    for case in CASES.values():
        assert case.size in MODELS[case.model].sizes
        assert set(case.peers) <= set(PEERS)
    assert set(QUICK_CASES) <= set(CASES)
    assert {CASES[name].size for name in DEFAULT} == {"bench", "long"}


def test_every_model_has_a_case_at_each_size() -> None:
    covered = {(case.model, case.size) for case in CASES.values()}
    assert covered == {(m.name, size) for m in MODELS.values() for size in m.sizes}


def test_peers_come_after_those_whose_peaks_they_need() -> None:
    for group in (ALL, CORE, QUICK):
        order = [peer.name for peer in with_references(group)]
        for position, name in enumerate(order):
            budget = PEERS[name].memory_budget
            if isinstance(budget, PeakOf):
                assert budget.peer in order[:position]


def test_step_times_are_compared_round_by_round(results: Write) -> None:
    rows = compare.step_rows(load(results("a.json")))
    rows["lm8", "inductor"]["step_seconds_rounds"] = [1.0, 2.0, 4.0]  # the machine slows down
    rows["lm8", "memopt"]["step_seconds_rounds"] = [1.1, 2.2, 1.0]
    assert compare.relative(rows, ("lm8", "memopt"), "step_seconds") == pytest.approx(1.1)
    del rows["lm8", "memopt"]["step_seconds_rounds"][0]
    seconds = [rows["lm8", peer]["step_seconds"] for peer in ("memopt", "inductor")]
    assert compare.relative(rows, ("lm8", "memopt"), "step_seconds") == seconds[0] / seconds[1]


def test_a_peer_brings_its_reference_along() -> None:
    names = [peer.name for peer in with_references(["memopt @ half of inductor"])]
    assert names == ["inductor", "memopt @ half of inductor"]
    with pytest.raises(ValueError, match="no peer 'tvm'"):
        with_references(["tvm"])


def test_relative_budgets_become_bytes() -> None:
    half = PEERS["memopt @ half of inductor"]
    assert resolve_budget(half, {"inductor": 1001}) == 500
    assert resolve_budget(PEERS["memopt min"], {}) == "min"
    assert resolve_budget(PEERS["memopt"], {}) is None
    with pytest.raises(LookupError, match="inductor has no peak"):
        resolve_budget(half, {})


def test_header_holds_what_one_needs_to_read_the_figures(results: Write) -> None:
    loaded = load(results("a.json"))
    assert loaded.keys() == HEADER_KEYS
    assert {"python", "torch", "triton", "transformers"} <= loaded["versions"].keys()
    assert {"name", "type", "cores"} <= loaded["device"].keys()


def test_rows_are_flat_json() -> None:
    row = json.loads(json.dumps(Row(case=CASES["lm8"], peer="eager", device="cpu").to_dict()))
    assert {"kind", "case", "model", "size", "outputs", "dtype", "peer", "status"} <= row.keys()
    assert not any(isinstance(value, dict) for value in row.values())


def test_a_foreign_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "other.json"
    path.write_text("{}")
    with pytest.raises(ValueError, match="not a results file"):
        load(path)
    path.write_text(json.dumps(dict.fromkeys(HEADER_KEYS, 0)))
    with pytest.raises(ValueError, match="schema version 0"):
        load(path)


def test_compare_divides_times_by_inductors_own(results: Write) -> None:
    text = StringIO()
    table = compare.table(results("a.json"), results("b.json", scale=0.5))
    Console(file=text, width=200).print(table)
    line = next(line for line in text.getvalue().splitlines() if " memopt min " in line)
    assert "0.500" in line
    assert "1.000" in line


def test_plot_writes_pictures_page_and_readme_table(results: Write, tmp_path: Path) -> None:
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{tables.START}\nold\n{tables.END}\nafter\n")
    written = plot.write_all([results("run.json")], tmp_path)
    assert all(path.exists() for path in written)
    picture = tmp_path / "docs" / "assets" / "run_lm8.png"
    assert picture.read_bytes().startswith(b"\x89PNG")
    page = (tmp_path / "docs" / "results.md").read_text()
    assert "| memopt min | min |" in page
    assert "| memopt @ half of inductor | 85.0 | 90.0 | 90.0 (over) |" in page
    assert "| memopt @ inductor+checkpoint | 85.0 | 80.0 | 80.0 |" in page
    assert "failed: a \\| b c" in page
    assert (
        "- `memopt @ half of inductor`: memopt, a budget of 0.5 of the peak of `inductor`" in page
    )
    assert "inductor auto-chunker" not in page
    assert "several graphs" not in page
    assert "| inductor | 60.0 | 6.0 |" in page
    text = readme.read_text()
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert "old" not in text
    assert "| lm8 |" in text
    plot.write_all([results("run.json")], tmp_path)
    assert readme.read_text() == text


def test_readme_tells_infeasible_from_not_measured(results: Write) -> None:
    loaded = load(results("run.json"))
    loaded["rows"] = [row for row in loaded["rows"] if row["peer"] != "eager"]
    low = next(row for row in loaded["rows"] if row["peer"] == "memopt @ half of inductor")
    low |= {"status": "infeasible", "peak_bytes": None}
    line = next(li for li in tables.readme_table([loaded]).splitlines() if li.startswith("| lm8"))
    cells = line.split(" | ")
    assert cells[1] == "-"
    assert "infeasible" in cells


def test_a_case_of_several_graphs_says_what_is_predicted() -> None:
    row = Row(case=CASES["control_flow"], peer="memopt", device="cpu").to_dict()
    assert "one graph alone" in tables.about(row)


def test_every_peer_has_a_description_of_its_own() -> None:
    assert len({peer.description for peer in PEERS.values()}) == len(PEERS)


def test_markers_are_required() -> None:
    with pytest.raises(ValueError, match="bench:start"):
        tables.put_between_markers("no markers", "table")


def test_eager_peers_run_side_by_side() -> None:
    case = Case(name="t", model="lm8", size="tiny", peers=("eager", "eager+checkpoint"))
    lines: list[str] = []
    eager, checkpointed = run_case(case, device="cpu", repeats=2, seed=0, say=lines.append)
    assert eager.status == checkpointed.status == "ok"
    assert eager.gradient_error == 0
    assert checkpointed.gradient_error is not None
    assert checkpointed.gradient_error < 1e-5
    assert checkpointed.peak_bytes is not None
    assert eager.peak_bytes is not None
    assert checkpointed.peak_bytes < eager.peak_bytes
    assert eager.gradient_bytes == checkpointed.gradient_bytes
    assert eager.gradient_bytes
    assert len(eager.step_seconds_rounds) == 2
    assert any("peak" in line for line in lines)


def test_rounds_are_shared_by_processes_that_start_anew() -> None:
    case = Case(name="t", model="lm8", size="tiny", peers=("eager", "eager+checkpoint"))
    lines: list[str] = []
    run = run_case(case, device="cpu", repeats=3, seed=0, say=lines.append, launches=2)
    for row in run:
        assert len(row.step_seconds_rounds) == 3
        assert row.cpu_seconds
    turns = [line.split()[2] for line in lines if line.endswith("done")]
    assert turns == ["1", "3", "2"]


def test_a_peer_that_fails_is_a_row_and_not_the_end() -> None:
    case = Case(name="t", model="in_place", size="tiny", peers=("eager", "eager+checkpoint"))
    eager, checkpointed = run_case(case, device="cpu", repeats=1, seed=0, say=lambda line: None)
    assert eager.status == "ok"
    assert checkpointed.status == "failed"
    assert "has no blocks" in checkpointed.error


def test_gradient_errors_are_relative_and_rounding_noise_does_not_count() -> None:
    expected = {"large": torch.tensor([10.0, 1.0]), "zero": torch.tensor([1e-9, 0.0])}
    actual = {"large": torch.tensor([10.0, 1.1]), "zero": torch.tensor([0.0, 1e-9])}
    assert relative_error(actual, expected) == pytest.approx(0.01)


def test_list_names_every_case() -> None:
    command = [sys.executable, "-m", "bench", "list"]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert all(name in output for name in CASES)
