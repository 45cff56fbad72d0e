"""The device table: every entry complete, and found by the names that users and drivers give."""

import pytest

from memopt.device import DEVICES, DeviceSpec, device_spec, spec_for_product
from memopt.errors import ConfigError


@pytest.mark.parametrize("spec", DEVICES.values(), ids=lambda s: s.name)
def test_every_figure_is_a_plausible_one(spec: DeviceSpec) -> None:
    assert DEVICES[spec.name] is spec
    assert min(spec.flops.values()) > 1e9
    assert 1e9 < spec.bandwidth < spec.flops_for("float32")
    assert 0 < spec.launch_seconds < 1e-3
    assert spec.allocation_granularity >= 1
    assert spec.flops_for("float16") >= spec.flops_for("float32")
    assert spec.flops_for("int64") == spec.flops_for("float32")


@pytest.mark.parametrize("name", ["cpu", "a100", "h100", "h200", "rtx4090", "mi300x"])
def test_the_promised_devices_are_there(name: str) -> None:
    assert device_spec(name).name == name


@pytest.mark.parametrize(
    ("product", "name"),
    [
        ("NVIDIA A100-SXM4-80GB", "a100"),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA GeForce RTX 4090", "rtx4090"),
        ("AMD Instinct MI300X", "mi300x"),
    ],
)
def test_a_drivers_product_name_finds_its_entry(product: str, name: str) -> None:
    assert spec_for_product(product).name == name


def test_an_unknown_accelerator_is_planned_for_as_an_a100() -> None:
    assert spec_for_product("Quantum 9000").name == "a100"


def test_a_name_that_is_nearly_right_is_answered_with_the_right_one() -> None:
    with pytest.raises(ConfigError, match="did you mean 'h100'"):
        device_spec("H1O0")
