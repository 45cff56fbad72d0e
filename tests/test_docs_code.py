"""Every block of code on the pages runs, in the order of its page, as a reader would run it.

A page is one session: its Python shares one namespace, blocks whose first line names a file are
written to it, commands run in the same folder. What a page takes for granted is in
``page_setups``. Without the mark ``slow`` plans run as they are: what Inductor makes of them is
tested elsewhere.
"""

import re
import shlex
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

import memopt
from bench.__main__ import OTHERS, _parser
from bench.cases import CASES
from bench.peers import PEERS
from memopt.attention import SpanPlan
from memopt.backend import PASSES, read_options
from tests.page_setups import SETUPS
from tests.pages import NOT_RUN, PAGES, ROOT, blocks_of, eager_lowering, run_console, run_python

BY_SECTION = {"docs/integrations.md"}  # each is about a library of its own
SLOW = {"docs/integrations.md#torchexport-and-aotinductor"}  # it compiles C++
LIBRARIES = {"accelerate", "datasets", "diffusers", "lightning", "peft", "transformers", "trl"}
Captured = pytest.CaptureFixture[str]


def sessions() -> list[str]:
    """Pages, or their sections, with something to run."""
    names = {
        f"{block.page}#{block.section}" if block.page in BY_SECTION else block.page: None
        for page in PAGES
        for block in blocks_of(page)
        if block.language in ("python", "console")
        and not page.startswith("docs/passes/")  # those are in test_docs_passes
    }
    return list(names)


SESSIONS = sessions()


def _spans(names: Mapping[str, Any]) -> None:
    assert names["plan"].longest == 192
    assert SpanPlan.load("plan.json") == names["plan"]
    assert Path("spans.png").stat().st_size > 10_000


def _reports(names: Mapping[str, Any]) -> None:
    assert '"beside":{' in Path("tight.html").read_text(encoding="utf-8")
    assert SpanPlan.load("spans.json").longest == 192


# What there is once a page has been followed.
LEFT_BEHIND: Mapping[str, Callable[[Mapping[str, Any]], None]] = {
    "docs/sparse-attention.md": _spans,
    "docs/command-line.md": _reports,
}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Sessions write where they may, import what they wrote, and leave no group behind."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(ROOT / "docs" / "examples")
    monkeypatch.syspath_prepend(tmp_path)
    yield
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def follow(session: str, capsys: Captured) -> None:
    """Run a page, or a section of it, from the first block to the last."""
    page, _, section = session.partition("#")
    names: dict[str, Any] = {"torch": torch, "memopt": memopt}
    try:
        names |= SETUPS[session]() if session in SETUPS else {}
    except ModuleNotFoundError as error:
        if error.name not in LIBRARIES:
            raise
        pytest.skip(f"{error.name} is not installed")
    for block in blocks_of(page):
        if section and block.section != section:
            continue
        if block.language == "python":
            run_python(block, names)
        elif block.language == "console":
            run_console(block, capsys)
    if session in LEFT_BEHIND:
        LEFT_BEHIND[session](names)


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize("session", sorted(set(SESSIONS) - SLOW))
def test_every_block_runs(session: str, capsys: Captured) -> None:
    with eager_lowering():
        follow(session, capsys)


@pytest.mark.slow
@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize("session", SESSIONS)
def test_every_block_runs_with_inductor(session: str, capsys: Captured) -> None:
    follow(session, capsys)


def test_every_setup_and_every_exception_is_of_use() -> None:
    assert set(SETUPS) <= set(SESSIONS)
    consoles = (b for page in PAGES for b in blocks_of(page) if b.language == "console")
    assert set(NOT_RUN) <= {command for block in consoles for command, _ in block.commands}


@pytest.mark.parametrize("page", PAGES)
def test_every_block_says_what_it_is(page: str) -> None:
    """What is neither Python nor a console must not look like it, since it is not run."""
    blocks = [*blocks_of(page)]
    assert (ROOT / page).read_text(encoding="utf-8").count("```") == 2 * len(blocks)
    for block in blocks:
        assert block.language in ("python", "console", ""), block
        if block.language == "":
            looks = r"^ *(\$|import|from|def|class|>>>|memopt|python|pip) "
            assert not re.search(looks, block.text, re.M), block
        if block.language == "console":
            assert block.commands, block


def quoted(pattern: str) -> list[str]:
    """What the pages have between backticks, its line breaks undone."""
    texts = ((ROOT / page).read_text(encoding="utf-8") for page in PAGES)
    prose = (re.sub(r"```.*?```", "", text, flags=re.S) for text in texts)
    found = (" ".join(code.split()) for text in prose for code in re.findall(r"`([^`]+)`", text))
    return sorted({code for code in found if re.match(pattern, code) and "..." not in code})


@pytest.mark.parametrize("command", quoted("python -m bench "))
def test_every_command_of_the_bench_that_is_named_exists(command: str) -> None:
    given = _parser().parse_args(shlex.split(command)[3:])
    assert set(getattr(given, "cases", ())) <= CASES.keys() | OTHERS.keys()
    if getattr(given, "peers", None):
        assert set(given.peers.split(",")) <= PEERS.keys()


@pytest.mark.parametrize("written", quoted(r"(options=)?\{.*\}$"))
def test_every_option_that_is_named_exists(written: str) -> None:
    options = eval(written.removeprefix("options="), {"__builtins__": {}})
    if written.startswith("options="):
        read_options(options)
    else:  # of some pass
        assert any(options.keys() <= vars(pass_).keys() for pass_ in PASSES)
