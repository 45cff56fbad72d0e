import builtins
import json
import re
from pathlib import Path
from typing import Any

import pytest

import memopt
from memopt.errors import ConfigError, MissingExtraError
from memopt.memory.timeline import LiveRange, Step, Timeline
from memopt.record import DecisionRow
from memopt.remarks import Remark, RemarkKind
from memopt.report import Report
from memopt.units import format_bytes, format_seconds
from tests.factories import make_record

HOSTILE = "</script><img src=x onerror=alert(1)>&lt;!--\u2028\u2029\ud800[bold]{{report}}"


@pytest.fixture
def report() -> Report:
    return Report((make_record(),))


def embedded(page: str) -> Any:
    found = re.search(r'<script type="application/json" id="report">(.*?)</script>', page, re.S)
    assert found is not None
    return json.loads(found[1])


def hostile_report() -> Report:
    row = DecisionRow(name=HOSTILE, op=HOSTILE, kind="keep", nbytes=1, seconds=1.0, source=HOSTILE)
    remark = Remark(pass_name=HOSTILE, kind=RemarkKind.MISSED, text=HOSTILE, node=HOSTILE)
    storage = LiveRange(name=HOSTILE, nbytes=7, first=0, last=0, source=HOSTILE, role=HOSTILE)
    timeline = Timeline(HOSTILE, (Step(HOSTILE, HOSTILE),), (storage,))
    fields: dict[str, Any] = {"decisions": (row,), "remarks": (remark,), "timelines": (timeline,)}
    return Report((make_record(id=HOSTILE, solver=HOSTILE, rewrites={HOSTILE: 1}, **fields),))


def test_graph_without_a_timeline_can_be_saved_and_plotted(tmp_path: Path) -> None:
    empty = Timeline("plan", (), ())
    report = Report((make_record(timelines=()), make_record(id="graph 1", timelines=(empty,))))
    assert report.save(tmp_path / "t.html").exists()
    assert report.plot(tmp_path / "t.png").exists()


def test_page_holds_decisions_and_timelines(report: Report, tmp_path: Path) -> None:
    (graph,) = embedded(report.save(tmp_path / "timeline.html").read_text("utf-8"))["graphs"]
    assert len(graph["rows"]) == 88
    unbounded = next(row for row in graph["rows"] if row[4] is None)
    assert unbounded[:2] == ["keep", "attention_0"]
    assert [t["label"] for t in graph["timelines"]] == [
        "everything kept", "stock partition", "plan",
    ]  # fmt: skip
    assert set(report.to_dict()["graphs"][0]) <= set(graph)


def test_page_loads_nothing_from_anywhere(report: Report, tmp_path: Path) -> None:
    page = report.save(tmp_path / "timeline.html").read_text("utf-8")
    for forbidden in (
        "http:",
        "https:",
        "//cdn",
        "@import",
        "url(",
        "fetch(",
        "innerHTML",
        "src=",
    ):
        assert forbidden not in page
    assert "default-src 'none'" in page


def test_hostile_names_stay_text(tmp_path: Path) -> None:
    report = hostile_report()
    page = report.save(tmp_path / "timeline.html").read_text("utf-8")
    clean = Report(()).save(tmp_path / "clean.html").read_text("utf-8")
    assert page.count("</script>") == clean.count("</script>")
    assert "<img" not in page
    assert "\u2028" not in page
    graph = embedded(page)["graphs"][0]
    assert graph["id"] == HOSTILE
    assert graph["rows"][0][1] == HOSTILE
    assert graph["timelines"][0]["ranges"][0][0] == HOSTILE


def test_a_page_holds_another_report_beside_its_own(report: Report, tmp_path: Path) -> None:
    other = Report((make_record(1), make_record(2, id="graph 1")))
    first = other.save(tmp_path / "first.html")
    for beside in (other, first, str(first)):
        body = embedded(report.save(tmp_path / "both.html", beside=beside).read_text("utf-8"))
        assert body["name"] == "both"
        assert body["beside"]["name"] == ("" if beside is other else "first")
        assert [len(graph["rows"]) for graph in body["beside"]["graphs"]] == [11, 22]
        assert len(body["graphs"]) == 1


def test_what_was_beside_a_page_is_not_taken_along(report: Report, tmp_path: Path) -> None:
    both = report.save(tmp_path / "both.html", beside=Report(()))
    body = embedded(report.save(tmp_path / "next.html", beside=both).read_text("utf-8"))
    assert body["beside"]["beside"] is None


def test_hostile_names_stay_text_beside_another_page(tmp_path: Path) -> None:
    first = hostile_report().save(tmp_path / "first.html")
    page = hostile_report().save(tmp_path / "both.html", beside=first).read_text("utf-8")
    assert "<img" not in page
    assert embedded(page)["beside"]["graphs"][0]["id"] == HOSTILE


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (None, "cannot read the page"),
        ("<html></html>", r"is no page of memopt: report\.save\(\) writes one"),
        ('<script type="application/json" id="report">{</script>', "is no page of memopt"),
        ('<script type="application/json" id="report">[]</script>', "is no page of memopt"),
        ("[" * 10**5, "is no page of memopt"),
    ],
)
def test_what_is_no_page_is_refused_beside_one(
    report: Report, tmp_path: Path, text: str | None, told: str
) -> None:
    first = tmp_path / "first.html"
    if text is not None:
        first.write_text(text)
    with pytest.raises(ConfigError, match=told):
        report.save(tmp_path / "both.html", beside=first)
    assert not (tmp_path / "both.html").exists()


def test_a_page_of_another_version_is_refused(report: Report, tmp_path: Path) -> None:
    first = report.save(tmp_path / "first.html")
    first.write_text(first.read_text("utf-8").replace(f'"{memopt.__version__}"', '"0.0.1"'))
    with pytest.raises(ConfigError, match=r"was written by memopt 0\.0\.1"):
        report.save(tmp_path / "both.html", beside=first)


def test_notebook_shows_the_page_in_a_frame(report: Report) -> None:
    frame = report._repr_html_()
    assert frame.startswith("<iframe srcdoc=")
    assert frame.count('"') == 6


@pytest.mark.parametrize(
    ("name", "magic"), [("t.png", b"\x89PNG"), ("t.svg", b"<?xml"), ("t.pdf", b"%PDF")]
)
def test_plot_writes_the_format_of_the_suffix(
    report: Report, tmp_path: Path, name: str, magic: bytes
) -> None:
    path = report.plot(tmp_path / name)
    assert path == tmp_path / name
    assert path.read_bytes().startswith(magic)


def test_dollar_signs_in_a_name_are_not_read_as_mathematics(tmp_path: Path) -> None:
    report = Report((make_record(id=r"$\frac$"),))
    assert report.plot(tmp_path / "t.png").exists()


def test_plot_leaves_out_the_lowest_peaks_of_many_graphs(tmp_path: Path) -> None:
    graphs = tuple(make_record(1, id=f"graph {i}") for i in range(9))
    assert Report(graphs).plot(tmp_path / "t.png").exists()


def test_plot_without_matplotlib_names_the_extra(
    report: Report, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = builtins.__import__

    def refuse(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(MissingExtraError, match=r"pip install 'memopt\[plot\]'"):
        report.plot(tmp_path / "t.png")


@pytest.mark.parametrize(
    ("nbytes", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.00 KiB"),
        (51_275_366, "48.9 MiB"),
        (2**20 - 1, "1.00 MiB"),
        (6 * 2**30, "6.00 GiB"),
        (10 * 2**20 - 1, "10.0 MiB"),
        (2**60, "1024.0 PiB"),
    ],
)
def test_bytes_are_written_in_binary_units(nbytes: int, text: str) -> None:
    assert format_bytes(nbytes) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.0, "0 s"),
        (3e-6, "3.00 µs"),
        (9.996e-4, "1.00 ms"),
        (0.0232, "23.2 ms"),
        (0.412, "412 ms"),
        (75.0, "75.0 s"),
        (float("inf"), "—"),
    ],
)
def test_seconds_are_written_with_three_digits(seconds: float, text: str) -> None:
    assert format_seconds(seconds) == text
