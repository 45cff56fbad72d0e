"""The documentation as a reader follows it: blocks of code, run in the order of their page."""

import os
import re
import shlex
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from memopt.backend import read_options
from memopt.cli import main
from memopt.config import Config

ROOT = Path(__file__).parents[1]
PAGES = sorted(
    path.relative_to(ROOT).as_posix() for path in (*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"))
)
_FENCED = re.compile(r"^(?P<indent> *)```(?P<language>\w*)\n(?P<text>.*?)^ *```$", re.M | re.S)
# Commands that set up an environment or run everything: what is looked at instead.
NOT_RUN: Mapping[str, str] = {
    "make demo": "a target of the Makefile",
    "make test": "a target of the Makefile",
    "make check": "a target of the Makefile",
    "make install": "a target of the Makefile",
    "make docs": "a target of the Makefile; a test builds the site",
    "pip install .": "test_packaging builds and tries the wheel",
    ".ci/run": "it runs the tests of the pages",
}


@dataclass(frozen=True)
class Block:
    """A fenced block of a page, and the section that it is in."""

    page: str
    line: int
    section: str
    language: str
    text: str

    @property
    def commands(self) -> list[tuple[str, str]]:
        """Of a console: commands without their comments, and what the page says they print."""
        parts = re.split(r"^\$ ", self.text, flags=re.M)[1:]
        split = (part.partition("\n") for part in parts)
        return [(re.sub(r"\s+# .*", "", command), said) for command, _, said in split]

    @property
    def file(self) -> str | None:
        """The file that Python is the text of, by its first line."""
        match = re.match(r"# ([\w/]+\.py)\n", self.text)
        return match[1] if match else None


def blocks_of(page: str) -> Iterator[Block]:
    """The blocks of a page, by its path from the root."""
    text = (ROOT / page).read_text(encoding="utf-8")
    for found in _FENCED.finditer(text):
        before = text[: found.start()]
        titles = re.findall(r"^#+ (.*)$", before, re.M)
        section = re.sub(r"[^\w -]", "", titles[-1]).lower().replace(" ", "-") if titles else ""
        lines = found["text"].splitlines(keepends=True)
        body = "".join(line.removeprefix(found["indent"]) for line in lines)
        yield Block(page, before.count("\n") + 1, section, found["language"], body)


@contextmanager
def eager_lowering() -> Iterator[None]:
    """Plans run as they are, where a page does not say otherwise."""
    real = Config.from_options.__func__  # type: ignore[attr-defined]

    def from_options(cls: Any, /, options: Any = None, **given: Any) -> Config:
        chosen: Config = real(cls, {"lowering": "eager", **(options or {})}, **given)
        return chosen

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Config, "from_options", classmethod(from_options))
        yield


def run_python(block: Block, names: dict[str, Any]) -> None:
    """Run a block among the names of its page; one that is a file is written to it."""
    if block.file is not None:
        path = Path(block.file)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(block.text, encoding="utf-8")
        return
    placed = "\n" * block.line + block.text  # tracebacks then name the page's own lines
    exec(compile(placed, str(ROOT / block.page), "exec"), names)
    if "options" in names:
        read_options(names["options"])


def run_console(block: Block, capsys: pytest.CaptureFixture[str]) -> None:
    """Run a block's commands, and compare what they print with what the page shows, if it does."""
    for command, said in block.commands:
        capsys.readouterr()
        program, *arguments = shlex.split(command)
        if program == "memopt":
            assert main(arguments) == 0, command
        else:
            assert command in NOT_RUN, f"nobody knows how to run {command!r}"
            _look_at(program, arguments)
        if said.strip():
            assert capsys.readouterr().out.strip() == said.strip()


def _look_at(program: str, arguments: list[str]) -> None:
    if program == "make":
        targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M)
        assert set(arguments) <= set(targets)
    elif program != "pip":
        assert os.access(ROOT / program, os.X_OK)
