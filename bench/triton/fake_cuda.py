"""A CUDA device for a torch that was built without: Inductor generates its code for one.

Tensors on it are fake: they have sizes and no data. It changes the process that it is in for good,
and rests on internals of torch 2.13, so it belongs in a process of its own.
"""

import ctypes
import dataclasses
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import types
from collections.abc import Callable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

TORCH = "2.13"
CAPABILITY = (9, 0)
_SOURCE = Path(__file__).with_suffix(".cpp")
_FLAGS = ("-O1", "-std=c++20", "-fPIC", "-shared")

# What Inductor reads of a device, as an H100 answers.
_PROPERTIES = types.SimpleNamespace(
    name="NVIDIA H100",
    major=CAPABILITY[0],
    minor=CAPABILITY[1],
    multi_processor_count=132,
    total_memory=80 * 2**30,
    warp_size=32,
    regs_per_multiprocessor=65536,
    max_threads_per_multi_processor=2048,
    max_threads_per_block=1024,
    shared_memory_per_block=48 * 1024,
    shared_memory_per_block_optin=227 * 1024,
    shared_memory_per_multiprocessor=228 * 1024,
    L2_cache_size=50 * 2**20,
)
_STREAM = types.SimpleNamespace(cuda_stream=0, device_index=0, stream_id=0)
# What functions of torch.cuda return from now on, whatever they are given.
_ANSWERS: Mapping[str, Any] = {
    "is_available": True,
    "is_initialized": True,
    "_lazy_init": None,
    "device_count": 1,
    "current_device": 0,
    "set_device": None,
    "_exchange_device": 0,
    "_maybe_exchange_device": 0,
    "get_device_properties": _PROPERTIES,
    "get_device_capability": CAPABILITY,
    "get_device_name": _PROPERTIES.name,
    "is_bf16_supported": True,
    "synchronize": None,
    "current_stream": _STREAM,
    "manual_seed_all": None,
    "set_rng_state": None,
}
# The same of torch._C, whose build lacks them.
_MISSING: Mapping[str, Any] = {
    "_cuda_getDeviceCount": 1,
    "_cuda_getCurrentRawStream": 0,
}


def unavailable() -> str | None:
    """Why there can be none here, or None if there can."""
    version = metadata.version("torch")
    if not version.startswith(f"{TORCH}."):
        return f"the fake CUDA device is made for torch {TORCH}, and torch {version} is installed"
    for module in ("triton", "numpy"):
        if importlib.util.find_spec(module) is None:
            return f"{module} is not installed"
    if shutil.which("g++") is None:
        return "g++ is not installed, and the fake CUDA device takes a few lines of C++"
    return None


def preload() -> None:
    """Answer for the device where torch asks in C++. Comes before torch is imported.

    Raises:
        ImportError: torch was imported already.
        subprocess.CalledProcessError: the C++ source does not compile.
    """
    if "torch" in sys.modules:
        raise ImportError("preload the fake CUDA device before torch is imported")
    ctypes.CDLL(str(_library()), ctypes.RTLD_GLOBAL)


def _library() -> Path:
    """The compiled source; compiled once for each version of it and of torch."""
    spec = importlib.util.find_spec("torch")
    assert spec is not None
    assert spec.origin is not None
    root = Path(spec.origin).parent
    facts = _SOURCE.read_text() + metadata.version("torch") + str(root)
    folder = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "memopt"
    path = folder / f"fake_cuda_{hashlib.sha256(facts.encode()).hexdigest()[:16]}.so"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            made = Path(scratch) / path.name
            command = ["g++", *_FLAGS, str(_SOURCE), f"-I{root}/include", f"-L{root}/lib"]
            command += ["-lc10", "-ltorch_cpu", f"-Wl,-rpath,{root}/lib", "-o", str(made)]
            subprocess.run(command, check=True)
            made.replace(path)  # in one step: another process may be at the same
    return path


def install() -> None:
    """Answer for the device where torch, Inductor and Triton ask in Python."""
    import torch
    from torch._dynamo import device_interface
    from torch._functorch import config as functorch_config
    from torch._inductor import config as inductor_config
    from torch._subclasses.fake_tensor import FakeTensorMode

    state = torch.zeros(16, dtype=torch.uint8)
    for name, value in {**_ANSWERS, "get_rng_state": state}.items():
        setattr(torch.cuda, name, _always(value))
    for name, value in _MISSING.items():
        setattr(torch._C, name, _always(value))
    torch.version.cuda = "13.0"
    interface = device_interface.CudaInterface
    for name in list(vars(interface)):
        if name in _ANSWERS and name != "is_available":
            setattr(interface, name, staticmethod(getattr(torch.cuda, name)))
    interface.exchange_device = staticmethod(torch.cuda._exchange_device)
    interface.maybe_exchange_device = staticmethod(torch.cuda._maybe_exchange_device)
    interface.get_raw_stream = staticmethod(_always(0))
    # Constants of the device's type are not to be made on it.
    patched: Any = FakeTensorMode
    patched.avoid_device_init = property(_always(True))
    inductor_config.joint_graph_constant_folding = False
    # What was compiled for a device that is there is no use here, nor the other way round.
    inductor_config.fx_graph_cache = False
    inductor_config.compile_threads = 1  # other processes have no such device
    functorch_config.enable_autograd_cache = False
    _install_driver()


def _install_driver() -> None:
    """Triton finds the device too, and compiles for it."""
    import triton

    from bench.triton.ahead import AbsentDriver

    class Driver(AbsentDriver):
        def __init__(self) -> None:
            super().__init__(10 * CAPABILITY[0] + CAPABILITY[1])

    backends = triton.backends.backends
    backends["nvidia"] = dataclasses.replace(backends["nvidia"], driver=Driver)
    triton.runtime.driver.set_active(Driver())


def _always(value: Any) -> Callable[..., Any]:
    """A function of its own: Dynamo knows some of torch's by identity."""
    return lambda *args, **kwargs: value
