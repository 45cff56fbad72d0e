"""What ``memopt doctor`` looks at: whether all that memopt needs is here, and what is off."""

import importlib
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from rich.text import Text

from memopt._torch import cache_dir, inductor_config
from memopt._versions import TORCH, TRANSFORMERS, TRITON, Requirement, __version__
from memopt.backend import PASSES
from memopt.device import spec_for_product
from memopt.errors import UnsupportedVersionError
from memopt.kernels import specs
from memopt.kernels.serving import knows
from memopt.units import format_bytes

State = Literal["good", "off", "fault"]
_MARKS = {"good": ("✓", "green"), "off": ("-", "yellow"), "fault": ("✗", "red")}
_SCARCE_BYTES = 2**30  # free at the caches: a large model's code and kernels take some 100 MB


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        topic: ``"versions"``, ``"device"``, ``"compiler"``, ``"caches"``, ``"passes"`` or
            ``"kernels"``.
        name: of the thing.
        state: ``"good"``; ``"off"``, where memopt does without; or ``"fault"``.
        text: what was seen and, of what is off, why; of a fault also the remedy.
    """

    topic: str
    name: str
    state: State
    text: str


@dataclass(frozen=True)
class Diagnosis:
    """All findings, to print or read."""

    findings: tuple[Finding, ...]

    @property
    def is_healthy(self) -> bool:
        """Whether nothing that memopt needs is missing."""
        return all(finding.state != "fault" for finding in self.findings)

    def to_dict(self) -> dict[str, Any]:
        """The diagnosis as plain JSON types."""
        findings = [asdict(finding) for finding in self.findings]
        return {"version": __version__, "healthy": self.is_healthy, "findings": findings}

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        table = Table(box=None, show_header=False, pad_edge=False)
        for style in ("dim", None, None):
            table.add_column(style=style, no_wrap=True)
        table.add_column(overflow="fold", ratio=1)
        topic = ""
        for (of, state, text), names in self._alike().items():
            if topic and of != topic:
                table.add_row()
            name = names[0] if len(names) == 1 else str(len(names))
            said = text if len(names) == 1 else f"{text}: {', '.join(names)}"
            table.add_row(of if of != topic else "", Text(*_MARKS[state]), Text(name), Text(said))
            topic = of
        yield table
        faults = sum(finding.state == "fault" for finding in self.findings)
        off = sum(finding.state == "off" for finding in self.findings)
        yield Text()
        verdict = f"{faults} to repair" if faults else "nothing to repair"
        yield Text(f"{verdict}, {off} off", style="bold red" if faults else "bold")

    def _alike(self) -> dict[tuple[str, State, str], list[str]]:
        """The names of what the same is said of, by what that is."""
        alike: dict[tuple[str, State, str], list[str]] = {}
        for finding in self.findings:
            key = finding.topic, finding.state, finding.text
            alike.setdefault(key, []).append(finding.name)
        return alike


def examine() -> Diagnosis:
    """Look at everything; nothing is compiled, and nothing is changed."""
    looks: tuple[Callable[[], Iterator[Finding]], ...] = (
        _versions, _devices, _compiler, _caches, _passes, _kernels,
    )  # fmt: skip
    return Diagnosis(tuple(finding for look in looks for finding in look()))


def _versions() -> Iterator[Finding]:
    yield Finding("versions", "memopt", "good", __version__)
    yield Finding("versions", "python", "good", platform.python_version())
    yield _version(TORCH, "")
    yield _version(TRITON, "kernels run as PyTorch code")
    yield _version(TRANSFORMERS, "memopt.cache is of no use", optional=True)


def _version(requirement: Requirement, without: str, *, optional: bool = False) -> Finding:
    """A dependency; ``without`` says what comes of its absence, where memopt can do without."""
    name, seen = requirement.name, requirement.installed
    if seen is None and (optional or requirement.optional):
        pip = f"pip install '{name}{requirement.specifier}'"
        return Finding("versions", name, "off", f"not installed: {without}; {pip}")
    try:
        requirement.check()
    except UnsupportedVersionError as error:
        return Finding("versions", name, "off" if optional else "fault", str(error))
    return Finding("versions", name, "good", f"{seen}, supported is {requirement.specifier}")


def _devices() -> Iterator[Finding]:
    if not torch.cuda.is_available():
        toolkit = torch.version.cuda or torch.version.hip
        why = (
            f"torch is built for {toolkit} and sees none: look at the driver, by nvidia-smi or "
            "rocm-smi, and at CUDA_VISIBLE_DEVICES"
            if toolkit
            else "torch is a build for the CPU"
        )
        yield Finding("device", "gpu", "off", why)
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        size = format_bytes(properties.total_memory)
        plans = f"plans are made for {spec_for_product(properties.name).name}"
        yield Finding("device", f"cuda:{index}", "good", f"{properties.name}, {size}; {plans}")
    cores = f"{os.cpu_count()} cores, {torch.get_num_threads()} threads"
    yield Finding("device", "cpu", "good", f"{platform.machine()}, {cores}")


def _compiler() -> Iterator[Finding]:
    """The first of Inductor's candidates that runs."""
    listed = inductor_config.cpp.cxx
    tried = [name for name in (listed if isinstance(listed, list | tuple) else [listed]) if name]
    for name in tried:
        found = shutil.which(name)
        if found:
            run = subprocess.run([found, "--version"], capture_output=True, text=True, check=False)
            if run.returncode == 0:
                line = run.stdout.partition("\n")[0]
                yield Finding("compiler", "C++", "good", f"{found}: {line}")
                return
    yield Finding(
        "compiler", "C++", "fault",
        f"none of {', '.join(tried)} runs, and Inductor needs one on the CPU: install g++, or "
        "name another in the environment variable CXX",
    )  # fmt: skip


def _caches() -> Iterator[Finding]:
    folder = cache_dir()
    try:
        os.makedirs(folder, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            free = shutil.disk_usage(folder).free
    except OSError as error:
        remedy = "name a folder that is yours in TORCHINDUCTOR_CACHE_DIR"
        yield Finding("caches", "inductor", "fault", f"cannot be written: {error}; {remedy}")
        return
    text = f"{folder}, {format_bytes(free)} free"
    if free < _SCARCE_BYTES:
        text += ": make room, or name another folder in TORCHINDUCTOR_CACHE_DIR"
    yield Finding("caches", "inductor", "good" if free >= _SCARCE_BYTES else "fault", text)
    if inductor_config.force_disable_caches:
        yield Finding("caches", "use", "off", "TORCHINDUCTOR_FORCE_DISABLE_CACHES is set")


def _passes() -> Iterator[Finding]:
    missing = _no_gpu_kernels()
    for name, pass_ in {pass_.name: pass_ for pass_ in PASSES}.items():
        why = reason_off(pass_, missing)
        yield Finding("passes", name, "off" if why else "good", why or "on")


def reason_off(pass_: Any, missing: str) -> str:
    """Why a pass does nothing here without options, or ``""``.

    Args:
        pass_: of `memopt.passes`.
        missing: why Triton kernels do not run, or ``""``.
    """
    fields = vars(pass_)
    if not getattr(pass_, "default", True) or ("plan" in fields and fields["plan"] is None):
        return "until options={'passes': ...} names it"
    if missing and fields.get("cpu") is False:
        return f"of use on a GPU only, and {missing}"
    return ""


def _kernels() -> Iterator[Finding]:
    missing = _no_gpu_kernels()
    text = f"PyTorch code, as {missing}" if missing else "Triton code"
    for spec in specs():
        yield Finding("kernels", spec.name, "off" if missing else "good", text)


def _no_gpu_kernels() -> str:
    """Why Triton kernels do not run here, or ``""``."""
    if TRITON.installed is None:
        return "Triton is not installed"
    if not torch.cuda.is_available():
        return "there is no GPU"
    if not knows(torch.device("cuda")):
        return "Triton serves GPUs of compute capability 8.0 and newer"
    try:
        importlib.import_module("triton.language")
    except (ImportError, OSError) as error:
        return f"Triton cannot be imported: {error}"
    return ""
