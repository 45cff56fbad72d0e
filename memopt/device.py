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
        link: bytes per second between device and host, in each direction.
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


def _gpu(
    name: str,
    *,
    fp32: float,
    tf32: float,
    half: float,
    bandwidth: float,
    gigabytes: int,
    processors: int,
    link: float,
) -> DeviceSpec:
    flops = {"float32": fp32, "tf32": tf32, "bfloat16": half, "float16": half}
    return DeviceSpec(
        name=name,
        flops=flops,
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
    spec.name: spec
    for spec in (
        _cpu(),
        _gpu(
            "a100",
            fp32=19.5e12,
            tf32=156e12,
            half=312e12,
            bandwidth=2.0e12,
            gigabytes=80,
            processors=108,
            link=25e9,
        ),
        _gpu(
            "h100",
            fp32=67e12,
            tf32=494e12,
            half=989e12,
            bandwidth=3.35e12,
            gigabytes=80,
            processors=132,
            link=45e9,
        ),
        _gpu(
            "h200",
            fp32=67e12,
            tf32=494e12,
            half=989e12,
            bandwidth=4.8e12,
            gigabytes=141,
            processors=132,
            link=45e9,
        ),
        _gpu(
            "b200",
            fp32=75e12,
            tf32=1100e12,
            half=2250e12,
            bandwidth=8.0e12,
            gigabytes=180,
            processors=148,
            link=45e9,
        ),
        _gpu(
            "l40s",
            fp32=91e12,
            tf32=183e12,
            half=362e12,
            bandwidth=0.86e12,
            gigabytes=48,
            processors=142,
            link=25e9,
        ),
        _gpu(
            "rtx4090",
            fp32=82e12,
            tf32=82e12,
            half=165e12,
            bandwidth=1.0e12,
            gigabytes=24,
            processors=128,
            link=25e9,
        ),
        _gpu(
            "mi300x",
            fp32=163e12,
            tf32=653e12,
            half=1307e12,
            bandwidth=5.3e12,
            gigabytes=192,
            processors=304,
            link=45e9,
        ),
    )
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
