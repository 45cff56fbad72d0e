"""The page as a person sees it: in headless Chromium, with no network."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import pytest

from memopt.report import Report
from tests.browser import Browser, browsing
from tests.factories import make_decisions, make_record

INK = """(() => {
  const canvas = document.querySelector(".chart canvas");
  const { data } = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
  let seen = 0;
  for (let i = 3; i < data.length; i += 4) seen += data[i] > 200;
  return seen;
})()"""
OVERFLOW = "document.documentElement.scrollWidth - document.documentElement.clientWidth"
BACKGROUND = "getComputedStyle(document.body).backgroundColor"
STEP = "document.querySelector('.inspect h3').textContent"


def texts(browser: Browser, query: str) -> list[str]:
    found = browser.read(f"[...document.querySelectorAll({query!r})].map((e) => e.textContent)")
    assert isinstance(found, list)
    return found


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with browsing(tmp_path_factory.mktemp("browser")) as browser:
        yield browser


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Report((make_record(),)).save(tmp_path_factory.mktemp("pages") / "one.html")


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pages")
    kept = tuple(dataclasses.replace(row, kind="keep") for row in make_decisions())
    loose = make_record(decisions=kept, predicted_peak_bytes=200 << 20)
    Report((loose,)).save(folder / "loose.html")
    return Report((make_record(),)).save(folder / "tight.html", beside=folder / "loose.html")


def test_it_opens_with_no_network_and_draws_the_timeline(browser: Browser, page: Path) -> None:
    browser.open(page)
    assert browser.requested == [page.as_uri()]
    assert browser.errors == []
    assert browser.read(INK) > 1000


def test_pointing_at_the_chart_tells_what_is_alive_there(browser: Browser, page: Path) -> None:
    browser.open(page)
    peak = browser.read(STEP)
    assert "77.9 MiB live, the peak" in peak
    place = "(({ left, top, width, height }) => [left, top, width, height])"
    chart = f"{place}(document.querySelector('.chart').getBoundingClientRect())"
    left, top, width, height = browser.read(chart)
    browser.point(left + 0.2 * width, top + 0.8 * height)
    assert "plan, forward, step 39 of 248" in browser.read(STEP)
    browser.point(left, top - 20)
    assert browser.read(STEP) == peak


def test_arrow_keys_go_from_step_to_step(browser: Browser, page: Path) -> None:
    browser.open(page)
    key = 'new KeyboardEvent("keydown", { key: "ArrowRight" })'
    browser.do(f"document.querySelector('.chart').dispatchEvent({key})")
    assert "step 98 of 248" in browser.read(STEP)


def test_a_click_on_a_heading_sorts(browser: Browser, page: Path) -> None:
    browser.open(page)
    sizes = ".decisions tbody td:nth-child(4)"
    assert texts(browser, sizes)[0] == "6.00 MiB"
    browser.do("document.querySelector('[data-column=\"3\"]').click()")
    assert texts(browser, sizes)[0] == "2.00 MiB"
    browser.do("document.querySelector('[data-column=\"1\"]').click()")
    assert texts(browser, ".decisions tbody code")[:3] == ["act_0", "act_1", "act_2"]


def test_words_filter_the_decisions(browser: Browser, page: Path) -> None:
    browser.open(page)
    typed = "const s = document.querySelector('input'); s.value = 'llama attention_3';"
    browser.do(f"{typed} s.dispatchEvent(new Event('input'))")
    assert texts(browser, ".decisions tbody code") == ["attention_3"]


def test_a_curve_can_be_hidden(browser: Browser, page: Path) -> None:
    browser.open(page)
    shown = browser.read(INK)
    browser.do("document.querySelector('button.curve').click()")
    assert browser.read(INK) != shown


@pytest.mark.parametrize(
    ("dark", "background"), [(False, "rgb(255, 255, 255)"), (True, "rgb(13, 17, 23)")]
)
def test_it_is_light_or_dark_as_is_preferred(
    browser: Browser, page: Path, dark: bool, background: str
) -> None:
    browser.open(page, dark=dark)
    assert browser.read(BACKGROUND) == background
    assert browser.read(INK) > 1000


def test_it_can_be_read_on_a_phone(browser: Browser, page: Path) -> None:
    browser.open(page, width=390)
    assert browser.read(OVERFLOW) == 0
    assert browser.read("innerWidth") == 390
    sizes = browser.read(
        "[...document.querySelectorAll('td, dd, p, button, h3')]"
        ".filter((e) => e.textContent).map((e) => parseFloat(getComputedStyle(e).fontSize))"
    )
    assert min(sizes) >= 12
    assert browser.read(INK) > 1000


@pytest.mark.parametrize("width", [1200, 390])
def test_two_plans_lie_side_by_side(browser: Browser, pair: Path, width: int) -> None:
    browser.open(pair, width=width)
    assert browser.errors == []
    assert browser.read(OVERFLOW) == 0
    assert texts(browser, ".beside tr:first-child th") == ["", "Aloose", "Btight", "A to B"]
    assert texts(browser, ".beside tr:nth-child(2) td") == [
        "Peak", "200.0 MiB", "77.9 MiB", "−61.1 %",  # noqa: RUF001
    ]  # fmt: skip
    assert len(texts(browser, ".inspect")) == 2
    assert set(texts(browser, ".decisions td:first-child")) == {"keep → recompute"}


def test_each_of_two_plans_can_be_seen_alone(browser: Browser, pair: Path) -> None:
    browser.open(pair)
    views = texts(browser, "#graphs button")
    assert views == ["A beside B ", "A: graph 0 200.0 MiB", "B: graph 0 77.9 MiB"]
    browser.do("document.querySelectorAll('#graphs button')[1].click()")
    assert texts(browser, ".beside") == []
    assert "keep" in texts(browser, ".decisions td:first-child")[0]
