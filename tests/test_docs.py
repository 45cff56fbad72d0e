"""What the documentation lists is all there is."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

import memopt
from bench import comparison
from bench.results import load
from tests.pages import PAGES, ROOT

SOURCES = [p for folder in ("memopt", "passes", "kernels") for p in (ROOT / folder).rglob("*.py")]
NAMED = re.compile(r"arXiv:\d{4}\.\d{5}|doi:10\.\d+/[\w.()/-]*\w")


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


@pytest.mark.parametrize(
    "source", sorted({s for p in SOURCES for s in NAMED.findall(p.read_text(encoding="utf-8"))})
)
def test_every_paper_that_code_names_is_among_the_references(source: str) -> None:
    assert source in read("docs/references.md")


@pytest.mark.parametrize("page", [p.removeprefix("docs/") for p in PAGES if p.startswith("docs/")])
def test_every_page_is_in_the_navigation(page: str) -> None:
    assert f" {page}\n" in read("mkdocs.yml")


def test_every_page_in_the_navigation_is_there() -> None:
    listed = re.findall(r"[:-] ([\w/-]+\.md)$", read("mkdocs.yml"), re.M)
    assert sorted(listed) == sorted(page.removeprefix("docs/") for page in PAGES if "/" in page)


@pytest.mark.parametrize("page", PAGES)
def test_every_link_to_a_page_leads_to_one(page: str) -> None:
    """What ``make docs`` says too, where it is installed."""
    for link in re.findall(r"\]\(([\w./-]+\.md)(?:#[\w-]+)?\)", read(page)):
        assert (ROOT / page).parent.joinpath(link).resolve().is_file(), link


@pytest.mark.parametrize("name", sorted(set(memopt.__all__) - {"__version__"}))
def test_every_public_name_is_in_the_reference(name: str) -> None:
    module = getattr(memopt, name).__module__
    places = {f"::: {place}.{name}" for place in (module, module.rpartition(".")[0])}
    shown = [page for page in PAGES if places & {*read(page).splitlines()}]
    assert len(shown) == 1


def test_the_figures_of_the_comparison_are_those_of_the_results() -> None:
    page, stems = (
        read("docs/comparison.md"),
        re.findall(r"^## (\w+)$", read("docs/results.md"), re.M),
    )
    files = [(stem, load(ROOT / "bench" / "results" / f"{stem}.json")) for stem in stems]
    assert comparison.fill(page, files) == page, "run: python -m bench plot"


@pytest.mark.slow
def test_the_site_builds_strictly_and_shows_the_functions(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    for name in ("memopt.explaining.explain", "memopt.report.Report", "memopt.losses.contrastive"):
        assert f'id="{name}"' in (tmp_path / "api.html").read_text(encoding="utf-8")
