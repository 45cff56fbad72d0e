"""What ``memopt doctor`` looks at: whether all that memopt needs is here, and what is off."""

import importlib
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

import torch

from memopt._torch import cache_dir, inductor_config
from memopt._versions import TRITON
from memopt.backend import PASSES
from memopt.cli.findings import Diagnosis, Finding, versions
from memopt.device import spec_for_product
from memopt.kernels import specs
from memopt.kernels.serving import knows
from memopt.units import format_bytes

_SCARCE_BYTES = 2**30  # free at the caches: a large model's code and kernels take some 100 MB


def examine() -> Diagnosis:
    """Look at everything; nothing is compiled, and nothing is changed."""
    looks: tuple[Callable[[], Iterator[Finding]], ...] = (
        versions, _devices, _compiler, _caches, _passes, _kernels,
    )  # fmt: skip
    return Diagnosis(tuple(finding for look in looks for finding in look()))


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
