"""The case of plans: areas under curves, and the rows and tables of small models."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from bench import __main__ as command
from bench import plans, plot
from bench.plan_cases import PlanCase
from bench.plan_tables import plan_section
from bench.plans import area
from bench.results import header, save
from bench.zoo import MODELS
from tests.test_planning import make


def test_an_area_is_the_mean_share_that_is_run_again() -> None:
    """From 10 to 20 bytes: half of 100 operations from 10 on, none from 15 on."""
    assert area([(10, 50.0), (15, 0.0)], 10, 20, 100.0) == pytest.approx(0.25)


def test_where_no_point_is_as_low_all_is_run_again() -> None:
    assert area([(15, 0.0)], 10, 20, 100.0) == pytest.approx(0.5)


def test_a_point_that_runs_more_again_at_a_higher_peak_does_not_count() -> None:
    curve = [(10, 50.0), (12, 70.0), (15, 0.0)]
    assert area(curve, 10, 20, 100.0) == area(curve[::2], 10, 20, 100.0)


def test_rows_of_every_kind_become_tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options: dict[str, Any] = {"half": {"memory_budget": 0.5}}
    monkeypatch.setattr(plans, "PLANS", {"small": PlanCase(lambda: make(2), options)})
    tiny = replace(MODELS["lm8"], sizes={"bench": MODELS["lm8"].sizes["tiny"]})
    monkeypatch.setattr(plans, "MODELS", {"lm8": tiny})
    monkeypatch.setattr(plans, "FORMS", ["norms"])
    monkeypatch.setattr(plans, "_TUNED", {"vocab": 2048})
    rows = plans.run("cpu", lambda line: None)
    stock, half = (row for row in rows if row["kind"] == "plan")
    assert half["peak_bytes"] < stock["peak_bytes"]
    assert half["saved_bytes"] < stock["saved_bytes"]
    held = {row["peer"]: row["held_bytes"] for row in rows if row["kind"] == "tuning"}
    assert held["memopt"] < held["inductor"] < held["eager"]
    areas = {row["peer"]: row["area"] for row in rows if row["kind"] == "frontier"}
    assert areas.keys() == {"memopt", "min-cut", "activation budget", "checkpoint"}
    assert all(areas["memopt"] < other for way, other in areas.items() if way != "memopt")
    save(tmp_path / "run.json", header(0, "cpu"), rows)
    plot.write_all([tmp_path / "run.json"], tmp_path)
    page = (tmp_path / "docs" / "results.md").read_text()
    assert "### plans" in page
    assert "| small | h100 | half |" in page
    assert "| norms |" in page


def test_without_plans_there_is_no_section() -> None:
    assert plan_section([]) == ""


@pytest.mark.parametrize(("status", "code"), [({}, 0), ({"status": "failed"}, 1)])
def test_the_command_ends_well_unless_a_row_failed(
    status: dict[str, str], code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows of a plan have no status: they are there, or there is an error."""
    rows = [{"kind": "plan", "peer": "memopt", **status}]
    monkeypatch.setitem(command.OTHERS, plans.CASE, (lambda device, say: rows, "one row"))
    assert command.main(["run", plans.CASE, "--out", str(tmp_path / "rows.json")]) == code
