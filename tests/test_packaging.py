"""Three source folders install as one package, which is light to import."""

import importlib
import importlib.util
import shutil
import subprocess
import sys
import zipfile
from importlib import metadata
from pathlib import Path

import pytest

import memopt

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[1]
SETUPTOOLS = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
FOLDERS = {"memopt": "memopt", "memopt.passes": "passes", "memopt.kernels": "kernels"}


def python(code: str) -> str:
    """What a fresh interpreter prints."""
    command = [sys.executable, "-c", code]
    run = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    return run.stdout.strip()


def test_every_folder_of_sources_is_a_listed_package() -> None:
    found = {path.parent for folder in FOLDERS.values() for path in (ROOT / folder).rglob("*.py")}
    assert {path.relative_to(ROOT).as_posix() for path in found} <= set(FOLDERS.values())
    assert SETUPTOOLS["packages"] == list(FOLDERS)
    assert {"memopt": "memopt", **SETUPTOOLS["package-dir"]} == FOLDERS


@pytest.mark.parametrize("name", ["passes", "kernels"])
def test_the_links_show_the_tree_as_it_installs(name: str) -> None:
    link = ROOT / "memopt" / name
    if not link.exists() or link.is_file():
        pytest.skip("this file system has no links")
    assert link.resolve() == (ROOT / name).resolve()


@pytest.mark.parametrize("package", FOLDERS)
def test_every_package_is_found(package: str) -> None:
    assert importlib.util.find_spec(package) is not None


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("passes.offload", "ImportError: import memopt.passes, not passes"),
        ("kernels.host", "ModuleNotFoundError: No module named 'kernels.host'"),
    ],
)
def test_a_folder_cannot_be_imported_under_a_second_name(name: str, told: str) -> None:
    with pytest.raises(subprocess.CalledProcessError) as raised:
        python(f"import {name}")
    assert told in raised.value.stderr


def test_transformers_works_in_a_checkout() -> None:
    """It asks for a package named kernels, and finds the folder of that name."""
    code = "from transformers.modeling_utils import PreTrainedModel; print('there')"
    assert python(code) == "there"


def test_importing_memopt_leaves_torch_alone() -> None:
    heavy = "{'torch', 'triton', 'scipy', 'numpy', 'sympy', 'rich'}"
    assert python(f"import sys, memopt; print(sorted({heavy} & set(sys.modules)))") == "[]"


def test_reading_the_options_leaves_torch_alone() -> None:
    code = "import sys, memopt; memopt.Config.from_options({}); print('torch' in sys.modules)"
    assert python(code) == "False"


@pytest.mark.parametrize("name", memopt.__all__)
def test_every_public_name_resolves_and_is_listed(name: str) -> None:
    assert getattr(memopt, name) is not None
    assert name in dir(memopt)


def test_an_unknown_public_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'optimise'"):
        memopt.optimise  # type: ignore[attr-defined]  # noqa: B018


def test_the_backend_is_found_by_entry_point() -> None:
    (entry,) = metadata.entry_points(group="torch_dynamo_backends", name="memopt")
    assert entry.value == "memopt.backend:memopt"
    assert callable(entry.load())


def test_the_installed_version_is_the_one_in_the_source() -> None:
    assert metadata.version("memopt") == memopt.__version__


@pytest.mark.slow
def test_the_wheel_holds_every_file_once(tmp_path: Path) -> None:
    tree = tmp_path / "tree"  # a build leaves its traces where it runs
    for folder in FOLDERS.values():
        shutil.copytree(ROOT / folder, tree / folder, symlinks=True)
    for name in ("pyproject.toml", "LICENSE", "README.md"):
        shutil.copy(ROOT / name, tree)
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", "."]
    subprocess.run(command, cwd=tree, check=True, capture_output=True)
    (wheel,) = tree.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert len(names) == len(set(names))
    for package, folder in FOLDERS.items():
        for path in (ROOT / folder).glob("*.py"):
            assert f"{package.replace('.', '/')}/{path.name}" in names
    data = [path.name for path in (ROOT / "memopt").iterdir() if path.is_file()]
    assert {f"memopt/{name}" for name in data} <= set(names)
