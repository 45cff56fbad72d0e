"""The command line: results on stdout, reasons in one line on stderr, exit statuses."""

import io
import json
import os
import subprocess
import sys
import time
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import nn

from memopt.cli import benching, main
from memopt.progress import working
from tests.test_packaging import ROOT, python

HERE = f"{__name__}:make"
Captured = pytest.CaptureFixture[str]


def make(batch: int = 2) -> tuple[nn.Module, Mapping[str, torch.Tensor]]:
    """A model that prints, as some do."""
    print("making a model")
    return nn.Sequential(nn.Linear(8, 8), nn.Tanh()), {"input": torch.ones(batch, 8)}


def make_nothing() -> None:
    """Returns no model."""


def test_the_version_of_the_help_needs_no_torch() -> None:
    code = (
        "import sys; from memopt.cli import main; main(['--help']); main(['plan', '--help']); "
        "print(sorted({'torch', 'numpy', 'scipy', 'sympy'} & set(sys.modules)))"
    )
    said = python(code)
    assert said.endswith("[]")
    for command in ("explain", "plan", "advise", "calibrate", "bench", "doctor"):
        assert command in said


@pytest.mark.parametrize(
    ("command", "told"),
    [
        ([], ""),
        (["plan"], "Missing argument 'MODULE:FUNCTION'; see: memopt plan --help"),
        (["plan", HERE], "Missing option '--device'; see: memopt plan --help"),
        (["plam"], "No such command 'plam'"),
        (["doctor", "--jsn"], "No such option: --jsn"),
        (["plan", HERE, "--device", "h100", "--size", "x"], "Invalid value for '--size'"),
        (["plan", HERE, "--device", "h100", "--beside", "a.html"], "it takes --html"),
    ],
)
def test_a_command_that_is_written_wrongly_ends_with_2(
    command: list[str], told: str, capsys: Captured
) -> None:
    assert main(command) == (2 if command else 0)
    said = capsys.readouterr()
    if command:
        assert said.out == ""
        assert said.err.startswith("memopt: ")
        assert said.err.count("\n") == 1
        assert told in said.err
    else:
        assert "Usage: memopt" in said.out


@pytest.mark.parametrize(
    ("command", "told"),
    [
        (["plan", f"{__name__}:make_nothing", "--device", "h100"], "returned NoneType: it has to"),
        (["plan", f"{__name__}:HERE", "--device", "h100"], "is no function"),
        (["plan", HERE, "--device", "h100", "--html", "x.txt"], "try 'x.html'"),
        (["explain", HERE, "--html", "nowhere/x.html"], "create it first"),
        (["explain", HERE, "--budget", "1 apple"], "1 apple"),
        (["calibrate", HERE, "--save", "x.txt"], "try 'x.json'"),
        (["calibrate", HERE, "--save", "x.json", "--lengths", "a"], "as 2048,4096"),
    ],
)
def test_what_cannot_be_done_is_told_in_one_line(
    command: list[str], told: str, capsys: Captured
) -> None:
    assert main(command) == 1
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.strip().splitlines()[-1].startswith("memopt: ")
    assert told in said.err


def test_json_is_all_that_stdout_holds(tmp_path: Path, capsys: Captured) -> None:
    first, second = tmp_path / "first.html", tmp_path / "second.html"
    command = ["plan", HERE, "--device", "h100", "--json", "--html"]
    assert main([*command, str(first), "--size", "4"]) == 0
    said = capsys.readouterr()
    (graph,) = json.loads(said.out)["graphs"]
    assert graph["training"]
    assert f"wrote {first}" in said.err.replace("\n", "")
    assert "making a model" in said.err
    assert main([*command, str(second), "--beside", str(first)]) == 0
    assert '"beside":{' in second.read_text("utf-8")


def test_a_page_to_be_beside_is_read_before_anything_is_compiled(
    tmp_path: Path, capsys: Captured
) -> None:
    command = ["explain", "no_such_module:f", "--html", str(tmp_path / "a.html")]
    assert main([*command, "--beside", str(tmp_path / "none.html")]) == 1
    assert "cannot read the page" in capsys.readouterr().err


def test_explain_compiles_and_reports(capsys: Captured) -> None:
    options = json.dumps({"lowering": "eager"})
    assert main(["explain", HERE, "--budget", "min", "--options", options, "--json"]) == 0
    (graph,) = json.loads(capsys.readouterr().out)["graphs"]
    assert (graph["lowering"], graph["budget"]) == ("eager", "min")
    assert main(["explain", HERE, "--options", options]) == 0
    assert "predicted peak" in capsys.readouterr().out


def test_advice_as_json(capsys: Captured) -> None:
    command = ["advise", HERE, "--device", "h100", "--most", "64", "--multiple", "64"]
    command += ["--json", "--budget"]
    assert main([*command, "1MiB"]) == 0
    advice = json.loads(capsys.readouterr().out)
    assert advice["size"] == 64
    assert advice["report"]["predicted_peak_bytes"] <= 2**20
    assert main([*command, "1KiB"]) == 1
    said = capsys.readouterr()
    assert json.loads(said.out) == {"size": 0, "report": None}
    assert "memopt: not even 64 fits under 1KiB: raise the budget" in said.err


class Spans:
    """What a calibration finds, as far as the command is concerned."""

    def save(self, path: Path) -> Path:
        path.write_text(self.to_json())
        return path

    def to_json(self) -> str:
        return '{"kind": "memopt span plan"}'


def test_calibrate_hands_on_what_was_asked(
    tmp_path: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, Any] = {}

    def calibrate(model: Any, batches: Any, **given: Any) -> Spans:
        print("profiling")
        seen.update(given, model=model, batches=batches)
        return Spans()

    fake = types.ModuleType("memopt.attention")
    monkeypatch.setattr(fake, "calibrate", calibrate, raising=False)
    monkeypatch.setitem(sys.modules, "memopt.attention", fake)
    monkeypatch.setitem(
        sys.modules, "maker", types.SimpleNamespace(make=lambda: ("model", [1], [2]))
    )
    path = tmp_path / "spans.json"
    command = ["calibrate", "maker:make", "--save", str(path), "--budget", "0.3", "--json"]
    assert main([*command, "--lengths", "128,256"]) == 0
    said = capsys.readouterr()
    assert json.loads(said.out) == json.loads(path.read_text())
    assert "profiling" in said.err
    assert seen == {
        "model": "model", "batches": [1], "holdout": [2], "budget": 0.3, "guard": 0.05,
        "lengths": [128, 256], "block": 64,
    }  # fmt: skip


def test_bench_runs_that_of_the_checkout(
    tmp_path: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert benching.checkout() == ROOT
    ran: list[list[str]] = []

    def run(command: list[str], *, cwd: Path, **_: Any) -> Any:
        ran.append(command[1:])
        assert cwd == ROOT
        Path(command[-1]).write_text('{"rows": []}\n')
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr(
        benching, "sys", types.SimpleNamespace(executable="python", stderr=sys.__stderr__)
    )
    assert main(["bench", "lm8", "--quick", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"rows": []}
    assert ran[0][:7] == ["-m", "bench", "run", "lm8", "--device", "cpu", "--quick"]


def test_bench_outside_a_checkout_says_so(
    tmp_path: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(benching, "__file__", str(tmp_path / "memopt" / "cli" / "benching.py"))
    assert main(["bench"]) == 1
    assert "run it from the root of one" in capsys.readouterr().err


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_a_shell_completes_commands(shell: str) -> None:
    words = {
        "bash": {"COMP_WORDS": "memopt ad", "COMP_CWORD": "1"},
        "zsh": {"_TYPER_COMPLETE_ARGS": "memopt ad"},
        "fish": {"_TYPER_COMPLETE_ARGS": "memopt ad", "_TYPER_COMPLETE_FISH_ACTION": "get-args"},
    }
    completing = {"_MEMOPT_COMPLETE": f"complete_{shell}", **words[shell]}
    run = subprocess.run(
        [sys.executable, "-m", "memopt"], env={**os.environ, **completing}, cwd=ROOT,
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert "advise" in run.stdout
    assert "doctor" not in run.stdout


@pytest.mark.parametrize("is_terminal", [True, False])
def test_a_bar_shows_on_a_terminal_once_work_takes_long(is_terminal: bool) -> None:
    console = Console(file=io.StringIO(), force_terminal=is_terminal, width=80)
    assert isinstance(console.file, io.StringIO)
    before = sys.stdout
    with working("planning", console, quiet=0.05) as say:
        deadline = time.monotonic() + (10 if is_terminal else 0.2)
        while time.monotonic() < deadline and "planning" not in console.file.getvalue():
            time.sleep(0.01)
        say("4: fits")
        assert sys.stdout is not before
    assert sys.stdout is before
    with working("quick", console, quiet=5.0):
        pass
    shown = console.file.getvalue()
    assert ("planning" in shown) == is_terminal
    assert "quick" not in shown
    assert "4: fits" in shown
