"""Three source folders install as one package, which is light to import."""

import ast
import importlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch

import memopt

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[1]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
SETUPTOOLS = PYPROJECT["tool"]["setuptools"]
PYTHONS = ("3.10", "3.11", "3.12", "3.13")
TOPS = {"memopt": "memopt", "memopt.passes": "passes", "memopt.kernels": "kernels"}
FOLDERS = {name: TOPS.get(name, name.replace(".", "/")) for name in SETUPTOOLS["packages"]}


def python(code: str) -> str:
    """What a fresh interpreter prints."""
    command = [sys.executable, "-c", code]
    run = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    return run.stdout.strip()


def test_every_folder_of_sources_is_a_listed_package() -> None:
    found = {path.parent for top in TOPS.values() for path in (ROOT / top).rglob("*.py")}
    assert {path.relative_to(ROOT).as_posix() for path in found} == set(FOLDERS.values())
    assert SETUPTOOLS["packages"] == list(FOLDERS)
    assert {"memopt": "memopt", **SETUPTOOLS["package-dir"]} == TOPS


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
    heavy = "{'torch', 'triton', 'scipy', 'numpy', 'sympy', 'rich', 'typer'}"
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


def test_the_changelog_begins_with_this_version() -> None:
    (version, *_) = re.findall(r"^## (\S+), ", (ROOT / "CHANGELOG.md").read_text("utf-8"), re.M)
    assert version == memopt.__version__
    assert re.fullmatch(r"\d+\.\d+\.\d+((a|b|rc)\d+)?", version)


def test_every_supported_python_is_listed_and_is_what_mypy_and_ruff_check_for() -> None:
    project = PYPROJECT["project"]
    listed = [c.removeprefix("Programming Language :: Python :: ") for c in project["classifiers"]]
    assert [c for c in listed if c.startswith("3.")] == list(PYTHONS)
    assert project["requires-python"] == f">={PYTHONS[0]}"
    assert PYPROJECT["tool"]["mypy"]["python_version"] == PYTHONS[0]
    assert PYPROJECT["tool"]["ruff"]["target-version"] == f"py{PYTHONS[0].replace('.', '')}"


def test_every_source_parses_on_the_oldest_python() -> None:
    folders = (*FOLDERS.values(), "bench", "tests", "docs/examples")
    for path in (path for folder in folders for path in (ROOT / folder).rglob("*.py")):
        ast.parse(path.read_text("utf-8"), str(path), feature_version=(3, 10))


@pytest.mark.slow
@pytest.mark.parametrize("version", PYTHONS[1:])
def test_types_hold_on_every_newer_python(version: str, tmp_path: Path) -> None:
    pytest.importorskip("mypy")
    command = [sys.executable, "-m", "mypy", "--python-version", version]
    command += ["--cache-dir", str(tmp_path)]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout


def test_importing_memopt_takes_less_than_50_milliseconds() -> None:
    """Of the processor: what else runs beside it counts for nothing."""
    clock = "time.process_time()"
    code = f"import time; start = {clock}; import memopt; print({clock} - start)"
    assert min(float(python(code)) for _ in range(3)) < 0.05


# What makes objects, or runs code, of what a file holds.
UNSAFE = {"pickle", "cPickle", "marshal", "shelve", "dill", "cloudpickle", "joblib", "torch.load"}


def unsafe_names(code: str) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module.split(".")[0]}
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            found.add(f"{node.value.id}.{node.attr}")
    return found & UNSAFE


def test_nothing_that_memopt_reads_is_unpickled() -> None:
    sources = [path for folder in FOLDERS.values() for path in (ROOT / folder).glob("*.py")]
    assert {path.name: unsafe_names(path.read_text(encoding="utf-8")) for path in sources} == {
        path.name: set() for path in sources
    }


@pytest.mark.parametrize(
    "code",
    ["import pickle", "from pickle import loads", "torch.load(path)", "from torch import load"],
)
def test_what_would_unpickle_is_seen(code: str) -> None:
    assert unsafe_names(code)


def build(folder: Path, source: Path, *kinds: str) -> None:
    """Build a copy of the sources, since a build leaves its traces where it runs."""
    tree = folder / "tree"
    if source == ROOT:
        for name in TOPS.values():
            shutil.copytree(source / name, tree / name, symlinks=True, ignore=CACHES)
        for name in ("pyproject.toml", "LICENSE", "README.md"):
            shutil.copy(source / name, tree)
    else:
        shutil.copytree(source, tree)
    command = [sys.executable, "-m", "build", *kinds, "--no-isolation", "--outdir", str(folder)]
    environment = {**os.environ, "SOURCE_DATE_EPOCH": "1700000000"}
    subprocess.run(command, cwd=tree, check=True, capture_output=True, env=environment)


CACHES = shutil.ignore_patterns("__pycache__")


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a wheel and an sdist."""
    folder = tmp_path_factory.mktemp("built")
    build(folder, ROOT, "--wheel", "--sdist")
    return folder


def wheel_of(folder: Path) -> Path:
    (wheel,) = folder.glob("*.whl")
    return wheel


@pytest.mark.slow
def test_the_wheel_holds_every_file_once(built: Path) -> None:
    names = zipfile.ZipFile(wheel_of(built)).namelist()
    assert len(names) == len(set(names))
    for package, folder in FOLDERS.items():
        for path in (ROOT / folder).glob("*.py"):
            assert f"{package.replace('.', '/')}/{path.name}" in names
    data = [p for folder in FOLDERS.values() for p in (ROOT / folder).iterdir() if p.is_file()]
    assert {path.name for path in data} <= {Path(name).name for name in names}


@pytest.mark.slow
def test_the_wheel_works_outside_of_the_tree(built: Path, tmp_path: Path) -> None:
    site = tmp_path / "site"
    zipfile.ZipFile(wheel_of(built)).extractall(site)
    (tmp_path / "maker.py").write_text(
        "import torch\n"
        "def make():\n"
        "    return torch.nn.Linear(4, 4), {'input': torch.ones(2, 4)}\n"
    )
    command = [sys.executable, "-m", "memopt", "plan", "maker:make", "--device", "h100"]
    run = subprocess.run(
        [*command, "--html", "page.html", "--json"], cwd=tmp_path, check=True,
        capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(site)},
    )  # fmt: skip
    assert json.loads(run.stdout)["graphs"]
    assert (tmp_path / "page.html").stat().st_size > 10_000


@pytest.mark.slow
def test_the_sdist_builds_the_same_wheel(built: Path, tmp_path: Path) -> None:
    (sdist,) = built.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path, filter="data")
    (source,) = (path for path in tmp_path.iterdir() if path.is_dir())
    again = tmp_path / "again"
    again.mkdir()
    build(again, source, "--wheel")
    first, second = zipfile.ZipFile(wheel_of(built)), zipfile.ZipFile(wheel_of(again))
    assert sorted(first.namelist()) == sorted(second.namelist())
    assert all(first.read(name) == second.read(name) for name in first.namelist())


@pytest.mark.slow
def test_two_builds_give_the_same_bytes(built: Path, tmp_path: Path) -> None:
    build(tmp_path, ROOT, "--wheel")
    assert wheel_of(built).read_bytes() == wheel_of(tmp_path).read_bytes()


USED = """
import torch, memopt
model = torch.compile(torch.nn.Linear(4, 4), backend="memopt", options={"lowering": "eager"})
model(torch.ones(2, 4)).sum().backward()
print(memopt.__file__)
"""


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["*.whl", "*.tar.gz"])
def test_what_is_built_installs_into_a_fresh_environment(
    built: Path, tmp_path: Path, kind: str
) -> None:
    """With the torch that is here, and nothing of this checkout."""
    (package,) = built.glob(kind)
    here = {**os.environ, "PYTHONPATH": ""}

    def run(*command: Any) -> str:
        done = subprocess.run(
            command, cwd=tmp_path, env=here, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout.strip()

    run(sys.executable, "-m", "venv", "--without-pip", "fresh")  # pip and setuptools of here
    own = tmp_path / "fresh" / "bin"
    purelib = run(own / "python", "-c", "import sysconfig; print(sysconfig.get_path('purelib'))")
    outer = Path(str(torch.__file__)).parents[1]
    (Path(purelib) / "outer.pth").write_text(f"{outer}\n")
    options = ["--no-index", "--no-deps", "--no-build-isolation", "--ignore-installed"]
    run(own / "python", "-m", "pip", "install", *options, package)
    assert run(own / "python", "-c", USED).startswith(purelib)
    assert "nothing to repair" in run(own / "memopt", "doctor")
    assert (Path(purelib) / "memopt" / "py.typed").is_file()
