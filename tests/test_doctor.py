import json
from pathlib import Path

import pytest
import torch

import memopt
from memopt import _versions
from memopt.cli import doctor, main
from memopt.passes import PRE_GRAD

Captured = pytest.CaptureFixture[str]


def finding(name: str) -> doctor.Finding:
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
