"""The pages of passes: every pass is there, and what they say of it is what it does."""

import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pytest

from memopt.backend import PASSES
from memopt.cli.doctor import reason_off
from memopt.passes import CUT_MAPS, CUT_ROWS, FORMS, JOINT, POST_GRAD, PRE_GRAD
from memopt.report import Report
from tests.pages import ROOT, blocks_of, eager_lowering, run_python

STAGES: Mapping[str, tuple[Any, ...]] = {
    "the traced graph": PRE_GRAD,
    "the joint graph": JOINT,
    "forms": FORMS,
    "pieces": (CUT_ROWS, CUT_MAPS),
    "each half": POST_GRAD,
}
BY_NAME: dict[str, Any] = {pass_.name: pass_ for pass_ in PASSES}
FACTS = ["runs", "saves", "pays", "does not", "exact", "says"]
LOSSY = {"sparse_attention", "compress"}
FOLDER = ROOT / "docs" / "passes"
SOURCES = "".join(
    " ".join(path.read_text(encoding="utf-8").split())
    for folder in ("passes", "memopt")
    for path in sorted((ROOT / folder).rglob("*.py"))
)


@dataclass(frozen=True)
class Section:
    """What a page says of one pass: its facts, and its options with their defaults."""

    page: str
    facts: dict[str, str]
    options: dict[str, str]


def sections() -> dict[str, Section]:
    found = {}
    for path in sorted(FOLDER.glob("*.md")):
        for part in path.read_text(encoding="utf-8").split("\n## ")[1:]:
            name, _, text = part.partition("\n")
            rows = re.findall(r"^\| (.*?) \| (.*?) \|(?: .*\|)?$", text, re.M)
            facts = {key: value for key, value in rows if not key.startswith("`")}
            facts.pop("option", None)
            options = {key.strip("`"): value for key, value in rows if key.startswith("`")}
            assert name not in found, f"{name} has two sections"
            found[name] = Section(path.name, facts, options)
    return found


SECTIONS = sections()


def table() -> str:
    """The table of the index, in the order in which passes run."""
    lines = ["| pass | rewrites | runs | exact |", "|---|---|---|---|"]
    for name in BY_NAME:
        stages = [stage for stage, passes in STAGES.items() if any(p.name == name for p in passes)]
        section = SECTIONS[name]
        link = f"[`{name}`]({section.page}#{name})"
        facts = section.facts
        lines.append(f"| {link} | {', '.join(stages)} | {facts['runs']} | {facts['exact']} |")
    return "\n".join(lines) + "\n"


def test_every_pass_has_one_section_and_every_section_a_pass() -> None:
    assert SECTIONS.keys() == BY_NAME.keys()


def test_the_index_is_that_of_the_registry() -> None:
    assert table() in (FOLDER / "index.md").read_text(encoding="utf-8"), table()


@pytest.mark.parametrize("name", BY_NAME)
def test_a_section_has_every_fact(name: str) -> None:
    assert list(SECTIONS[name].facts) == FACTS


@pytest.mark.parametrize("name", BY_NAME)
def test_options_and_their_defaults_are_those_of_the_pass(name: str) -> None:
    stated = {
        key: value.strip("`").replace('"', "'") for key, value in SECTIONS[name].options.items()
    }
    assert stated == {key: repr(value) for key, value in vars(BY_NAME[name]).items()}


@pytest.mark.parametrize("name", BY_NAME)
def test_a_pass_runs_when_its_section_says(name: str) -> None:
    runs, pass_ = SECTIONS[name].facts["runs"], BY_NAME[name]
    assert ("when named" in runs) == bool(reason_off(pass_, ""))
    assert runs.endswith("on a GPU") or vars(pass_).get("cpu") is not False
    about = sys.modules[type(pass_).__module__].__doc__ or ""
    bounded = pass_ in FORMS or "Runs under a budget" in " ".join(about.split())
    assert ("under a budget" in runs) == bounded
    exact = SECTIONS[name].facts["exact"]
    assert exact.startswith("no: ") == (name in LOSSY)
    assert bool(getattr(pass_, "loss", 0.0)) <= (name in LOSSY)


@pytest.mark.parametrize("name", BY_NAME)
def test_what_it_says_is_in_the_sources(name: str) -> None:
    for remark in re.findall(r"`([^`]*)`", SECTIONS[name].facts["says"]):
        for part in filter(None, map(str.strip, remark.split("…"))):
            assert part in SOURCES, remark


# What the eager lowering does not do: these are seen at work where Inductor lowers.
BEHIND_INDUCTOR = {"early_products", "unshare_readers"}
EXAMPLES = sorted(path.name for path in FOLDER.glob("*.md") if path.name != "index.md")


def did(report: Report, name: str) -> int:
    """How often a pass did something: rewrites, values in its form, or values cut."""
    kind = getattr(BY_NAME[name], "kind", None)
    covers = getattr(BY_NAME[name], "covers", None)
    return sum(
        graph.rewrites.get(name, 0)
        + sum(row.kind == kind for row in graph.decisions)
        + sum(r.pass_name == name and r.text.startswith(covers or "-") for r in graph.remarks)
        for graph in report.graphs
    )


def at_work(page: str) -> dict[str, bool]:
    """Follow a page: whether each pass with an example does something in it."""
    names: dict[str, Any] = {}
    found = {}
    for block in blocks_of(f"docs/passes/{page}"):
        if block.language == "python":
            run_python(block, names)
            if block.section in BY_NAME:
                found[block.section] = did(names["report"], block.section) > 0
    missing = {name for name, section in SECTIONS.items() if section.page == page} - found.keys()
    assert missing <= {"sparse_attention"}  # which takes a plan; see its own page
    return found


@pytest.mark.parametrize("page", EXAMPLES)
def test_in_every_example_the_pass_does_something(page: str) -> None:
    with eager_lowering():
        found = at_work(page)
    assert found == {name: name not in BEHIND_INDUCTOR for name in found}


@pytest.mark.slow
@pytest.mark.parametrize("page", EXAMPLES)
def test_with_inductor_they_all_do(page: str) -> None:
    assert all(at_work(page).values())
