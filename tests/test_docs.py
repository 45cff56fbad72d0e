"""What the documentation lists is all there is."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = [p for folder in ("memopt", "passes", "kernels") for p in (ROOT / folder).rglob("*.py")]
NAMED = re.compile(r"arXiv:\d{4}\.\d{5}|doi:10\.\d+/[\w.()/-]*\w")


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


@pytest.mark.parametrize(
    "source", sorted({s for p in SOURCES for s in NAMED.findall(p.read_text(encoding="utf-8"))})
)
def test_every_paper_that_code_names_is_among_the_references(source: str) -> None:
    assert source in read("docs/references.md")


@pytest.mark.parametrize("page", sorted(p.name for p in (ROOT / "docs").glob("*.md")))
def test_every_page_is_in_the_navigation(page: str) -> None:
    assert f": {page}\n" in read("mkdocs.yml")
