"""One place states the supported versions; everything else agrees with it."""

import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import pytest

from memopt import _versions
from memopt.errors import UnsupportedVersionError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

PROJECT = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]


def installed(**versions: str) -> Callable[[str], str]:
    """A stand-in for ``metadata.version`` on a machine with these distributions."""

    def version(name: str) -> str:
        if name in versions:
            return versions[name]
        raise metadata.PackageNotFoundError(name)

    return version


def test_the_project_table_names_the_same_torch_range() -> None:
    (requirement,) = [d for d in PROJECT["dependencies"] if d.startswith("torch")]
    assert requirement == f"torch{_versions.TORCH.specifier}"


@pytest.mark.parametrize("torch", ["2.11.0", "2.12.1+cu130", "2.13.0a0+git1a2b3c", "2.13.0+cpu"])
def test_a_supported_torch_passes_without_triton(
    monkeypatch: pytest.MonkeyPatch, torch: str
) -> None:
    monkeypatch.setattr(metadata, "version", installed(torch=torch))
    _versions.check()


@pytest.mark.parametrize("torch", ["2.10.1", "2.14.0.dev20261101", "1.13.1", "3.0", "unknown"])
def test_another_torch_is_refused_with_the_range_and_the_command(
    monkeypatch: pytest.MonkeyPatch, torch: str
) -> None:
    monkeypatch.setattr(metadata, "version", installed(torch=torch))
    with pytest.raises(UnsupportedVersionError) as caught:
        _versions.check()
    assert f"torch {torch} is installed" in str(caught.value)
    assert "supports torch 2.11 to 2.13" in str(caught.value)
    assert "pip install 'torch>=2.11,<2.14'" in str(caught.value)


def test_a_missing_torch_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metadata, "version", installed())
    with pytest.raises(UnsupportedVersionError, match="torch is not installed"):
        _versions.check()


@pytest.mark.parametrize("triton", ["3.6.0", "3.9.1"])
def test_a_supported_triton_passes(monkeypatch: pytest.MonkeyPatch, triton: str) -> None:
    monkeypatch.setattr(metadata, "version", installed(torch="2.13.0", triton=triton))
    _versions.check()


@pytest.mark.parametrize("name", _versions.TRITON.distributions)
@pytest.mark.parametrize("triton", ["3.5.1", "3.10.0", "2.1"])
def test_another_triton_is_refused_under_any_of_its_names(
    monkeypatch: pytest.MonkeyPatch, name: str, triton: str
) -> None:
    monkeypatch.setattr(metadata, "version", installed(**{"torch": "2.13.0", name: triton}))
    with pytest.raises(UnsupportedVersionError, match=r"supports triton 3\.6 to 3\.9"):
        _versions.check()


def test_an_unsupported_version_is_also_an_import_error() -> None:
    assert issubclass(UnsupportedVersionError, ImportError)
