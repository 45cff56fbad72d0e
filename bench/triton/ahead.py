"""Compile Triton kernels for GPUs that are not there, and read what the binary is made of.

Triton compiles without a driver once it believes that a device is there, and brings the assembler
and the disassembler. Counts are of instructions in the binary, not of instructions that run.
"""

import contextlib
import io
import re
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.runtime import driver
from triton.runtime.autotuner import Autotuner, Heuristics
from triton.runtime.jit import JITFunction

Target = int | str
TARGETS: tuple[Target, ...] = (80, 90, 100, "gfx942")

# Shared memory that one block may ask for, in bytes.
_SHARED_LIMIT_BYTES: Mapping[Target, int] = {
    80: 163 * 1024,
    90: 227 * 1024,
    100: 227 * 1024,
    "gfx942": 64 * 1024,
}
_PROCESSORS: Mapping[Target, int] = {80: 108, 90: 132, 100: 148, "gfx942": 304}
_MNEMONIC = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)")
_NVIDIA = {
    "loads": r"LDG|UTMALDG|UBLKCP|LDGSTS",
    "vector_loads": r"LDG\.E.*\.128|LDGSTS.*\.128|UTMALDG|UBLKCP",
    "stores": r"STG|UTMASTG",
    "vector_stores": r"STG\.E.*\.128|UTMASTG",
    "matrix_products": r"[HQIDO]MMA|[HQI]GMMA|UT[CHQO]\w*MMA",
}
_AMD = {
    "loads": r"(global|buffer)_load",
    "vector_loads": r"(global|buffer)_load_dwordx4",
    "stores": r"(global|buffer)_store",
    "vector_stores": r"(global|buffer)_store_dwordx4",
    "matrix_products": r"v_mfma",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What one kernel became for one target.

    Attributes:
        target: compute capability, or the name of an AMD architecture.
        registers: of one thread, 32 bits each.
        spilled_bytes: of one thread, to and from memory.
        shared_bytes: of one block.
        shared_limit_bytes: what one block may have.
        loads: instructions that read device memory.
        vector_loads: those of 128 bits or more.
        stores: instructions that write device memory.
        vector_stores: those of 128 bits or more.
        matrix_products: instructions of the tensor cores.
    """

    target: Target
    registers: int
    spilled_bytes: int
    shared_bytes: int
    shared_limit_bytes: int
    loads: int
    vector_loads: int
    stores: int
    vector_stores: int
    matrix_products: int

    def problems(self) -> list[str]:
        """What no kernel should have: spills, or more shared memory than there is."""
        found = []
        if self.spilled_bytes:
            found.append(f"{self.target}: spills {self.spilled_bytes} bytes per thread")
        if self.shared_bytes > self.shared_limit_bytes:
            found.append(
                f"{self.target}: {self.shared_bytes} bytes of shared memory; "
                f"a block has {self.shared_limit_bytes}"
            )
        return found


def compile_for(
    kernel: Any, arguments: Mapping[str, Any], target: Target, *, config: int = 0, **options: Any
) -> Report:
    """Compile a kernel as a launch with these arguments would.

    Args:
        kernel: a jitted function, also under autotuning and heuristics.
        arguments: by parameter name: a tensor on any device, or a dtype for an aligned pointer
            to it; an int, a float, a constant, as it would be passed.
        target: 80, 90, 100 or ``"gfx942"``.
        config: which configuration of an autotuned kernel to take, by its number.
        **options: of a launch: ``num_warps``, ``num_stages``.

    Raises:
        triton.CompilationError: the kernel does not compile; and what else Triton raises.
    """
    passed, jitted = {"enable_fp_fusion": True, **arguments}, kernel  # 3.9 warns if it is not said
    while not isinstance(jitted, JITFunction):
        if isinstance(jitted, Autotuner):
            passed.update(jitted.configs[config].all_kwargs())
        elif isinstance(jitted, Heuristics):
            for name, choose in jitted.values.items():
                passed[name] = choose(passed)
        jitted = jitted.fn
    passed.update(options)
    pointers = {k: _Pointer(v) if isinstance(v, torch.dtype) else v for k, v in passed.items()}
    log = io.StringIO()
    with _present(target), _fresh(jitted), contextlib.redirect_stdout(log):
        compiled = jitted.run(grid=(1,), warmup=True, **pointers)
    measure = _amd if isinstance(target, str) else _nvidia
    return Report(
        target=target,
        shared_bytes=compiled.metadata.shared,
        shared_limit_bytes=_SHARED_LIMIT_BYTES[target],
        **measure(compiled, log.getvalue()),
    )


@dataclass(frozen=True)
class _Pointer:
    """A tensor, as far as a launch looks at it: its dtype, and an aligned address."""

    dtype: torch.dtype

    def data_ptr(self) -> int:
        return 0

    def ptr_range(self) -> int:
        """How far AMD's compiler may assume that offsets reach: no further than it can say."""
        return 0


class AbsentDriver(DriverBase):  # type: ignore[misc]
    """A device that compiles and cannot launch."""

    def __init__(self, target: Target) -> None:
        self.utils = self
        self.arch = target

    def get_current_target(self) -> Any:
        if isinstance(self.arch, str):
            return GPUTarget("hip", self.arch, 64)
        return GPUTarget("cuda", self.arch, 32)

    def get_device_properties(self, device: int) -> dict[str, int]:
        shared, count = _SHARED_LIMIT_BYTES[self.arch], _PROCESSORS[self.arch]
        return {
            "max_shared_mem": shared,
            "multiprocessor_count": count,
            "max_num_regs": 65536,
            "warpSize": self.get_current_target().warp_size,
        }

    def load_binary(self, *args: Any) -> tuple[None, None, int, int, int]:
        return None, None, 0, 0, 1024  # module, function, registers, spills, threads at most

    @classmethod
    def is_active(cls) -> bool:
        return True

    def map_python_to_cpp_type(self, kind: str) -> str:
        return kind

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_benchmarker(self) -> Any:
        raise NotImplementedError("there is no device to measure on")

    @staticmethod
    def launcher_cls(*args: Any) -> None:
        """Nothing can be launched."""


@contextlib.contextmanager
def _present(target: Target) -> Iterator[None]:
    """Within it, Triton believes that the target is there."""
    before = driver._active
    driver.set_active(AbsentDriver(target))
    try:
        yield
    finally:
        driver._active = before


@contextlib.contextmanager
def _fresh(jitted: Any) -> Iterator[None]:
    """Within it, the kernel is compiled anew, and the assembler says what it spilled.

    Triton's cache in memory knows devices by number, so it would hand out another target's code.
    """
    before = jitted.device_caches
    jitted.device_caches = type(before)(jitted.create_binder)
    with (
        tempfile.TemporaryDirectory() as folder,
        knobs.nvidia.scope(),
        knobs.cache.scope(),
        knobs.compilation.scope(),
    ):
        knobs.nvidia.dump_ptxas_log = True
        knobs.compilation.always_compile = True
        knobs.cache.dir = folder
        try:
            yield
        finally:
            jitted.device_caches = before


def _counts(mnemonics: list[str], classes: Mapping[str, str]) -> dict[str, int]:
    return {
        name: sum(re.match(pattern, mnemonic) is not None for mnemonic in mnemonics)
        for name, pattern in classes.items()
    }


def _nvidia(compiled: Any, log: str) -> dict[str, int]:
    """From the assembler's log and the disassembly."""
    registers = re.search(r"Used (\d+) registers", log)
    spills = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", log)
    assert registers is not None, f"the assembler's log says no registers: {log!r}"
    assert spills is not None, f"the assembler's log says no spills: {log!r}"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [knobs.nvidia.nvdisasm.path, "-c", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return {
        "registers": int(registers[1]),
        "spilled_bytes": int(spills[1]) + int(spills[2]),
        **_counts(_MNEMONIC.findall(text), _NVIDIA),
    }


def _amd(compiled: Any, log: str) -> dict[str, int]:
    """From the assembly and the notes at its end."""
    text = compiled.asm["amdgcn"]

    def note(name: str) -> int:
        found = re.search(rf"\.{name}:\s+(\d+)", text)
        assert found is not None, f"the assembly has no note {name!r}"
        return int(found[1])

    return {
        "registers": note("vgpr_count"),
        "spilled_bytes": 4 * note("vgpr_spill_count"),
        **_counts(re.findall(r"^\s+([a-z]\w+)", text, re.MULTILINE), _AMD),
    }
