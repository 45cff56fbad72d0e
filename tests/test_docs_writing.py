"""The pages that teach are followed to the letter, in a copy of the tree."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.pages import ROOT, blocks_of

TREE = ("memopt", "passes", "kernels", "bench", "tests", "pyproject.toml")
LEFT = shutil.ignore_patterns("__pycache__", "results", "data", ".*")


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    for name in TREE:
        source = ROOT / name
        if source.is_file():
            shutil.copy(source, tmp_path)
        else:
            shutil.copytree(source, tmp_path / name, symlinks=True, ignore=LEFT)
    return tmp_path


def write_files(page: str, tree: Path) -> list[str]:
    """Every file of a page, where it says."""
    files = [block for block in blocks_of(page) if block.file is not None]
    for block in files:
        assert block.file is not None
        (tree / block.file).write_text(block.text, encoding="utf-8")
    return [block.file for block in files if block.file is not None]


def put_after(path: Path, line: str, new: str) -> None:
    """Put lines behind every occurrence of one, as the page says."""
    text = path.read_text(encoding="utf-8")
    assert f"\n{line}\n" in text
    path.write_text(text.replace(f"\n{line}\n", f"\n{line}\n{new}\n"), encoding="utf-8")


def run(tree: Path, *command: str) -> str:
    """What a command prints in the copy.

    Raises:
        AssertionError: it fails.
    """
    done = subprocess.run(
        [sys.executable, "-m", *command], cwd=tree, capture_output=True, text=True, check=False,
        env={**os.environ, "PYTHONPATH": str(tree)},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def assert_is_in_style(tree: Path, files: list[str]) -> None:
    """As ``make check`` asks; tests of a page are shorter, and have no types."""
    pytest.importorskip("ruff")
    sources = [file for file in files if not file.startswith("tests/")]
    run(tree, "ruff", "check", *sources)
    run(tree, "ruff", "format", "--check", *files)


def test_a_pass_is_written_as_the_page_says(tree: Path) -> None:
    files = write_files("docs/writing-a-pass.md", tree)
    registry = tree / "passes" / "__init__.py"
    put_after(
        registry,
        "from memopt.passes.remake_in_backward import RemakeInBackward",
        "from memopt.passes.remove_add_zero import RemoveAddZero",
    )
    put_after(registry, "    EarlyGradients(),", "    RemoveAddZero(),")
    assert_is_in_style(tree, files)
    said = run(tree, "pytest", "-q", "tests/passes/test_remove_add_zero.py")
    assert "2 passed" in said


def with_the_kernel(tree: Path) -> list[str]:
    files = write_files("docs/writing-a-kernel.md", tree)
    put_after(tree / "kernels" / "__init__.py", "        softmax,", "        squared_relu,")
    line = '    "memopt.kernels.triton_softmax",'
    put_after(tree / "pyproject.toml", line, '    "memopt.kernels.triton_squared_relu",')
    return files


def test_a_kernel_is_written_as_the_page_says(tree: Path) -> None:
    pytest.importorskip("triton")
    files = with_the_kernel(tree)
    assert_is_in_style(tree, files)
    chosen = "squared_relu and bfloat16 and (interpreted_it or says_what)"
    said = run(tree, "pytest", "-q", "tests/kernels/test_specs.py", "-k", chosen)
    assert " passed" in said


@pytest.mark.slow
def test_the_kernel_of_the_page_passes_the_whole_gate_and_mypy(tree: Path) -> None:
    pytest.importorskip("triton")
    files = with_the_kernel(tree)
    run(tree, "pytest", "-q", "tests/kernels/test_specs.py", "-k", "squared_relu")
    modules = [f"memopt.{file.removesuffix('.py').replace('/', '.')}" for file in files]
    run(tree, "mypy", *(part for module in modules for part in ("-m", module)))
