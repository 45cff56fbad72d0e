import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import memopt
from memopt import _versions
from memopt.cli import doctor, main
from memopt.cli.findings import Finding, without_torch
from memopt.passes import PRE_GRAD

ROOT = Path(__file__).parents[1]
Captured = pytest.CaptureFixture[str]


def finding(name: str) -> Finding:
    return next(f for f in doctor.examine().findings if f.name == name)


def test_the_diagnosis_tells_everything(capsys: Captured) -> None:
    assert main(["doctor", "--json"]) == 0
    body = json.loads(capsys.readouterr().out)
    assert body["version"] == memopt.__version__
    assert body["healthy"] is True
    topics = ["versions", "device", "compiler", "caches", "passes", "kernels"]
    assert list(dict.fromkeys(f["topic"] for f in body["findings"])) == topics
    assert all(f["text"] for f in body["findings"])
    assert {p.name for p in PRE_GRAD} <= {f["name"] for f in body["findings"]}
    assert main(["doctor"]) == 0
    said = capsys.readouterr().out
    assert "nothing to repair" in said
    assert torch.__version__ in said


def test_what_is_off_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert finding("chunk_losses").state == "good"
    assert finding("compress").text == "until options={'passes': ...} names it"
    assert finding("early_backward").state == "off"
    assert finding("fuse_norms").text == "of use on a GPU only, and there is no GPU"
    assert finding("memopt::norm").text == "PyTorch code, as there is no GPU"


def test_nothing_is_missing_on_a_gpu_with_triton() -> None:
    off = {pass_.name: doctor.reason_off(pass_, "") for pass_ in PRE_GRAD}
    named = "until options={'passes': ...} names it"
    assert off.pop("sparse_attention") == named  # it wants a plan
    assert not any(off.values())


def test_without_a_compiler_there_is_a_fault_with_its_remedy(
    monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    with torch._inductor.config.patch({"cpp.cxx": (None, "no-such-compiler")}):
        assert "none of no-such-compiler runs" in finding("C++").text
        assert main(["doctor"]) == 1
    assert "1 to repair" in capsys.readouterr().out


def test_caches_that_cannot_be_written_are_a_fault(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setattr(doctor, "cache_dir", lambda: str(tmp_path / "file" / "cache"))
    seen = finding("inductor")
    assert seen.state == "fault"
    assert "TORCHINDUCTOR_CACHE_DIR" in seen.text


@pytest.mark.parametrize(
    ("name", "installed", "state"),
    [("torch", "2.0.1", "fault"), ("triton", None, "off"), ("transformers", "4.0", "off")],
)
def test_versions_out_of_the_range_are_told(
    name: str, installed: str | None, state: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = _versions._installed

    def pretend(distributions: tuple[str, ...]) -> str | None:
        return installed if distributions[0] == name else real(distributions)

    monkeypatch.setattr(_versions, "_installed", pretend)
    seen = finding(name)
    assert seen.state == state
    assert f"pip install '{name}>=" in seen.text


def other_torch(folder: Path, version: str) -> dict[str, str]:
    """An environment in which torch is said to be of another version."""
    info = folder / f"torch-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: torch\nVersion: {version}\n")
    return {**os.environ, "PYTHONPATH": os.pathsep.join((str(folder), str(ROOT)))}


def memopt_with(environment: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "memopt", *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def test_on_another_torch_the_doctor_says_what_is_wrong(tmp_path: Path) -> None:
    environment = other_torch(tmp_path, "2.4.1")
    run = memopt_with(environment, "doctor", "--json")
    assert run.returncode == 1
    assert "UserWarning: torch 2.4.1 is installed" in run.stderr  # of the import
    body = json.loads(run.stdout)
    found = {finding["name"]: finding for finding in body["findings"]}
    assert found["torch"]["state"] == "fault"
    assert "pip install 'torch>=2.11,<2.14'" in found["torch"]["text"]
    topics = ["versions", "device", "compiler", "caches", "passes", "kernels"]
    assert list(dict.fromkeys(f["topic"] for f in body["findings"])) == topics


@pytest.mark.parametrize("command", [["plan", "m:f", "--device", "h100"], ["explain", "m:f"]])
def test_on_another_torch_other_commands_say_so_in_one_line(
    command: list[str], tmp_path: Path
) -> None:
    (tmp_path / "m.py").write_text("def f():\n    return None\n")
    run = memopt_with(other_torch(tmp_path, "2.4.1"), *command)
    assert run.returncode == 1
    *_, line = run.stderr.strip().splitlines()  # behind the import's warning
    assert line.startswith("memopt: torch 2.4.1 is installed, but memopt")


@pytest.mark.parametrize(
    ("command", "told"),
    [
        ("doctor", "pip install 'torch>=2.11,<2.14'"),
        ("explain", "memopt: torch is not installed; run: pip install 'torch>=2.11,<2.14'"),
    ],
)
def test_without_torch_a_command_says_so(command: str, told: str) -> None:
    code = f"""
import sys
from importlib import metadata
real = metadata.version
def version(name):
    if name == "torch":
        raise metadata.PackageNotFoundError(name)
    return real(name)
metadata.version = version
sys.modules["torch"] = None
from memopt.cli import main
raise SystemExit(main([{command!r}, *({command!r} == "explain") * ["json:loads"]]))
"""
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert run.returncode == 1
    assert "Traceback" not in run.stderr
    assert told in " ".join((run.stdout + run.stderr).split())


@pytest.mark.parametrize(
    "code",
    ["import memopt; memopt.optimize", "from memopt import explain", "import memopt.backend",
     "import memopt.losses", "import memopt.passes", "import memopt.kernels.norm"],
)  # fmt: skip
def test_on_another_torch_nothing_that_needs_it_is_imported(code: str, tmp_path: Path) -> None:
    run = subprocess.run(
        [sys.executable, "-c", code], env=other_torch(tmp_path, "2.14.0"),
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert "UnsupportedVersionError: torch 2.14.0 is installed" in run.stderr


def test_importing_memopt_on_another_torch_warns(tmp_path: Path) -> None:
    run = subprocess.run(
        [sys.executable, "-W", "error", "-c", "import memopt"],
        env=other_torch(tmp_path, "2.14.0"), capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert "UserWarning: torch 2.14.0 is installed, but memopt" in run.stderr


def test_a_torch_that_cannot_be_imported_is_a_fault() -> None:
    diagnosis = without_torch(OSError("libtorch.so: cannot open shared object file"))
    assert not diagnosis.is_healthy
    (fault,) = (f for f in diagnosis.findings if f.state == "fault")
    assert "cannot open shared object file; install it anew: pip install" in fault.text
