"""The device table: the few numbers per device that a roofline needs.

Figures are the vendors' dense peaks, derated where noted. Planning needs ratios, not seconds to
the digit; ``cost="measured"`` replaces them by measurement.
"""

import difflib
import os
from dataclasses import dataclass

from memopt.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceSpec:
    """What one device can do.

    Attributes:
        name: key in the table.
        flops: peak dense floating-point operations per second by dtype name.
        bandwidth: bytes per second to and from main memory.
        memory_bytes: capacity; 0 where it is the host's and not fixed.
        launch_seconds: cost of starting one kernel.
        allocation_granularity: the allocator rounds each storage up to a multiple of this.
        processors: streaming multiprocessors, compute units or cores.
        link: bytes per second between the device and its host, in each direction.
    """

    name: str
    flops: dict[str, float]
    bandwidth: float
    memory_bytes: int
    launch_seconds: float
    allocation_granularity: int
    processors: int
    link: float

    def flops_for(self, dtype: str) -> float:
        """Peak for a dtype; unlisted dtypes run at fp32 speed."""
        return self.flops.get(dtype, self.flops["float32"])


# Operations per second of float32, TF32 and 16-bit floating point; bytes per second; GiB of
# memory; processors; bytes per second of the link to the host, as pinned copies reach it.
_GPUS = {
    "a100": (19.5e12, 156e12, 312e12, 2.0e12, 80, 108, 25e9),
    "h100": (67e12, 494e12, 989e12, 3.35e12, 80, 132, 45e9),
    "h200": (67e12, 494e12, 989e12, 4.8e12, 141, 132, 45e9),
    "b200": (75e12, 1100e12, 2250e12, 8.0e12, 180, 148, 45e9),
    "l40s": (91e12, 183e12, 362e12, 0.86e12, 48, 142, 25e9),
    "rtx4090": (82e12, 82e12, 165e12, 1.0e12, 24, 128, 25e9),
    "mi300x": (163e12, 653e12, 1307e12, 5.3e12, 192, 304, 45e9),
}


def _gpu(
    name: str,
    fp32: float,
    tf32: float,
    half: float,
    bandwidth: float,
    gigabytes: int,
    processors: int,
    link: float,
) -> DeviceSpec:
    return DeviceSpec(
        name=name,
        flops={"float32": fp32, "tf32": tf32, "bfloat16": half, "float16": half},
        bandwidth=bandwidth,
        memory_bytes=gigabytes * 2**30,
        launch_seconds=4e-6,
        allocation_granularity=512,
        processors=processors,
        link=link,
    )


def _cpu() -> DeviceSpec:
    cores = os.cpu_count() or 1
    return DeviceSpec(
        name="cpu",
        flops={"float32": 60e9 * cores, "float64": 30e9 * cores, "bfloat16": 60e9 * cores},
        bandwidth=8e9 * cores,
        memory_bytes=0,
        launch_seconds=2e-6,
        allocation_granularity=1,
        processors=cores,
        link=8e9,
    )


DEVICES: dict[str, DeviceSpec] = {
    "cpu": _cpu(),
    **{name: _gpu(name, *figures) for name, figures in _GPUS.items()},
}


def device_spec(name: str) -> DeviceSpec:
    """Look a device up by its table name.

    Raises:
        ConfigError: the name is not in the table.
    """
    if name in DEVICES:
        return DEVICES[name]
    near = difflib.get_close_matches(name.lower(), DEVICES, n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    raise ConfigError(f"unknown device {name!r}: {hint}known devices: {sorted(DEVICES)}")


def spec_for_product(product: str) -> DeviceSpec:
    """The nearest entry for a driver's product name, such as ``"NVIDIA H200"``.

    An unknown accelerator is planned for as an A100: its ratio of arithmetic to bandwidth is
    the most typical.
    """
    squeezed = product.lower().replace(" ", "")
    return next((spec for name, spec in DEVICES.items() if name in squeezed), DEVICES["a100"])
