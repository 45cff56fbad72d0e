import io
import json
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

import memopt
from memopt.errors import ConfigError
from memopt.memory.timeline import LiveRange, Step, Timeline
from memopt.record import DecisionRow
from memopt.remarks import Remark, RemarkKind
from memopt.report import Report
from memopt.report.page import split_step
from tests.factories import make_inference_record, make_record

GRAPH_KEYS = {
    "id", "training", "lowering", "baseline_peak_bytes", "predicted_peak_bytes", "certified",
    "budget", "budget_bytes", "held_bytes", "saved_bytes", "recompute_seconds", "forward_seconds",
    "planning_seconds", "solver", "decisions", "rewrites", "remarks", "step_seconds",
    "baseline_step_seconds", "host_bytes", "file_bytes", "stall_seconds",
}  # fmt: skip


@pytest.fixture
def report() -> Report:
    return Report((make_record(),))


def test_dict_holds_the_documented_keys_and_no_others(report: Report) -> None:
    shown = report.to_dict()
    assert set(shown) == {"version", "predicted_peak_bytes", "gradient_error", "graphs"}
    assert shown["version"] == memopt.__version__
    assert [set(graph) for graph in shown["graphs"]] == [GRAPH_KEYS]


def test_dict_counts_decisions_by_kind_and_rewrites_by_pass(report: Report) -> None:
    (graph,) = report.to_dict()["graphs"]
    assert graph["decisions"] == {"keep": 16, "recompute": 72}
    assert graph["rewrites"] == {"chunk_losses": 0, "fuse_swiglu": 8}
    assert len(graph["remarks"]) == 10
    assert set(graph["remarks"][0]) == {"pass", "kind", "node", "source", "text"}


def test_json_reads_back_as_the_dict(report: Report) -> None:
    assert json.loads(report.to_json()) == report.to_dict()
    assert report.to_json() == Report((make_record(),)).to_json()


def test_unbounded_seconds_become_null_so_that_the_json_stays_valid() -> None:
    report = Report((make_record(recompute_seconds=float("inf"), forward_seconds=float("nan")),))
    (graph,) = json.loads(report.to_json())["graphs"]
    assert graph["recompute_seconds"] is None
    assert graph["forward_seconds"] is None
    assert "recompute  —" in str(report)


def test_predicted_peak_counts_what_earlier_graphs_hold() -> None:
    first = make_record(predicted_peak_bytes=100, held_bytes=0)
    second = make_record(id="graph 1", predicted_peak_bytes=70, held_bytes=40)
    assert Report((first, second)).to_dict()["predicted_peak_bytes"] == 110


def test_terminal_table_says_what_was_decided_and_why(report: Report) -> None:
    text = str(report)
    for expected in (
        "1 graph, predicted peak 77.9 MiB",
        "graph 0 · training · inductor",
        "297.0 MiB → 77.9 MiB (-73.8%; read from the final schedule)",
        "80.2 MiB (met, 2.34 MiB to spare)",
        "23.2 ms a step, 29.7% of the forward",
        "16 keep (64.8 MiB), 72 recompute (228.0 MiB)",
        "qkv_0 (x8)",
        "models/llama.py:47",
        "train.py:88",
        "the backward of layer 7 binds",
    ):
        assert expected in text


def test_remarks_that_differ_in_the_node_only_are_one_row(report: Report) -> None:
    text = str(report)
    assert text.count("gate and up are one product") == 1
    assert "(x8)" in text.partition("gate and up")[2]


def test_exceeded_budget_says_by_how_much() -> None:
    text = str(Report((make_record(predicted_peak_bytes=3 << 20, budget_bytes=2 << 20),)))
    assert "2.00 MiB (exceeded by 1.00 MiB)" in text


def test_a_budget_without_bytes_is_told_by_its_name() -> None:
    lowest = make_record(budget="min", budget_bytes=None)
    fraction = make_inference_record(budget="0.5")
    assert re.search(r"budget +min\n", str(Report((lowest,))))
    assert "0.5: nothing to plan in inference" in str(Report((fraction,)))


def test_many_decisions_and_remarks_say_how_many_are_left_out() -> None:
    remarks = tuple(
        Remark(pass_name="planner", kind=RemarkKind.ANALYSIS, text=f"statement {i}")
        for i in range(25)
    )
    text = str(Report((make_record(remarks=remarks),)))
    assert "and 1 more; report.save() shows all" in text
    assert "and 5 more; report.save() shows all" in text


def test_report_prints_on_a_narrow_console(report: Report) -> None:
    console = Console(width=40, record=True, file=io.StringIO())
    console.print(report)
    assert "77.9 MiB" in console.export_text()


def test_print_writes_to_the_terminal(report: Report, capsys: pytest.CaptureFixture[str]) -> None:
    report.print()
    assert "graph 0" in capsys.readouterr().out


def test_repr_is_one_short_line(report: Report) -> None:
    assert repr(report) == "<Report: 1 graph, predicted peak 77.9 MiB>"


def test_empty_report_can_be_printed_saved_and_plotted(tmp_path: Path) -> None:
    report = Report(())
    assert report.to_dict()["predicted_peak_bytes"] == 0
    assert "no graph was compiled" in str(report)
    assert '"graphs":[]' in report.save(tmp_path / "t.html").read_text("utf-8")
    assert report.plot(tmp_path / "t.png").stat().st_size > 0


def test_inference_graph_has_one_timeline_and_no_backward_figures(tmp_path: Path) -> None:
    report = Report((make_inference_record(),))
    text = str(report)
    assert "inference" in text
    assert "forward to backward" not in text
    assert "(+0.0%" in text
    assert "everything kept" not in str(report)
    assert report.save(tmp_path / "t.html").exists()
    assert report.plot(tmp_path / "t.png").exists()


def test_markup_in_names_is_printed_as_it_is() -> None:
    row = DecisionRow(name="[red]x", op="op[/]", kind="keep", nbytes=1, seconds=0.0)
    text = str(Report((make_record(decisions=(row,), id="[b]graph"),)))
    assert "[red]x" in text
    assert "op[/]" in text
    assert "[b]graph" in text


@pytest.mark.parametrize("name", ["timeline", "timeline.txt", "timeline.png"])
def test_save_refuses_another_suffix_and_offers_one(report: Report, name: str) -> None:
    with pytest.raises(ConfigError, match=r"must end in \.html.*try 'timeline\.html'"):
        report.save(name)


def test_plot_refuses_another_suffix(report: Report) -> None:
    with pytest.raises(ConfigError, match=r"\.png or \.svg or \.pdf; try 'timeline\.png'"):
        report.plot("timeline.html")


def test_missing_folder_is_named(report: Report, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere' does not exist; create it first"):
        report.save(tmp_path / "nowhere" / "timeline.html")


def test_folder_in_place_of_a_file_is_refused(report: Report, tmp_path: Path) -> None:
    (tmp_path / "timeline.html").mkdir()
    with pytest.raises(ConfigError, match="it is a folder"):
        report.save(tmp_path / "timeline.html")


@st.composite
def timelines(draw: st.DrawFn) -> Timeline:
    count = draw(st.integers(1, 30))
    turn = draw(st.integers(0, count))
    ends = st.tuples(st.integers(0, count - 1), st.integers(0, count - 1)).map(sorted)
    ranges = tuple(
        LiveRange(name=f"s{i}", nbytes=nbytes, first=first, last=last)
        for i, (nbytes, (first, last)) in enumerate(
            draw(st.lists(st.tuples(st.integers(0, 2**40), ends), max_size=30))
        )
    )
    steps = tuple(Step(f"n{i}", backward=i >= turn) for i in range(count))
    return Timeline("plan", steps, ranges)


@given(timelines())
def test_live_bytes_agree_with_a_count_at_every_step(timeline: Timeline) -> None:
    counted = tuple(
        sum(r.nbytes for r in timeline.ranges if r.first <= step <= r.last)
        for step in range(len(timeline.steps))
    )
    assert timeline.live_bytes == counted
    assert timeline.peak_bytes == max(counted)
    assert timeline.peak_step == counted.index(max(counted))


@given(timelines())
def test_holders_add_up_to_the_live_bytes_and_come_largest_first(timeline: Timeline) -> None:
    for step, live in enumerate(timeline.live_bytes):
        sizes = [r.nbytes for r in timeline.holders(step)]
        assert sum(sizes) == live
        assert sizes == sorted(sizes, reverse=True)


def test_empty_timeline_has_no_peak() -> None:
    timeline = Timeline("plan", (), ())
    assert timeline.live_bytes == ()
    assert timeline.peak_bytes == 0
    assert timeline.peak_step == 0


@given(timelines())
def test_backward_begins_at_the_split(timeline: Timeline) -> None:
    split = split_step(timeline)
    assert not any(step.backward for step in timeline.steps[:split])
    assert all(step.backward for step in timeline.steps[split:])
