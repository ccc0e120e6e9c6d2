"""Contract: every device profile is complete, sourced and consistent. Agreement: peaks equal width times clock."""

import dataclasses
import re

import pytest

from vlmdeploy.devices import DEVICES, GIB, Device, device, names
from vlmdeploy.errors import ConfigError

# Dense tensor-core operations per SM and clock, a multiply-add being two: float16 with float32 sums, int8. GeForce
# cards halve the first. From the whitepapers named in devices.py; for Orin and Thor what NVIDIA's TOPS come out at.
OPERATIONS_PER_SM = {
    ("8.0", "datacenter"): (2048, 4096),
    ("8.7", "jetson"): (2048, 4096),
    ("8.9", "datacenter"): (1024, 2048),
    ("8.9", "rtx"): (512, 2048),
    ("9.0", "datacenter"): (4096, 8192),
    ("11.0", "jetson"): (8192, None),
    ("12.0", "rtx"): (512, 2048),
}
TOPS_ROUNDING = 0.025  # NVIDIA gives 40 TOPS for 40.96
IDENTITY = {"name", "title", "kind", "sources"}

every_device = pytest.mark.parametrize("profile", DEVICES, ids=names())
jetsons = pytest.mark.parametrize("profile", [d for d in DEVICES if d.kind == "jetson"], ids=lambda d: d.name)


def figures(profile: Device) -> dict[str, object]:
    """The stored figures of a device that are known."""
    fields = {field.name: getattr(profile, field.name) for field in dataclasses.fields(profile)}
    return {name: value for name, value in fields.items() if name not in IDENTITY and value not in (None, ())}


def test_the_table_holds_the_devices_that_are_promised() -> None:
    promised = {"orin-nano-8", "orin-nx-16", "agx-orin-32", "agx-orin-64", "thor", "rtx-4060-ti-16", "rtx-4080"}
    promised |= {"rtx-5060-ti-16", "rtx-5080", "l4", "a100-40", "a100-80", "h100", "h200"}
    assert set(names()) == promised
    assert len(names()) == len(promised), "a name occurs twice"


@every_device
def test_every_figure_is_positive(profile: Device) -> None:
    numbers = {name: value for name, value in figures(profile).items() if isinstance(value, int | float)}
    assert len(numbers) >= 6
    assert all(value > 0 for value in numbers.values()), numbers


@every_device
def test_every_figure_has_a_source_that_says_something(profile: Device) -> None:
    sourced = {name for source in profile.sources for name in source.figures}
    assert set(figures(profile)) == sourced
    assert all(source.document and source.says for source in profile.sources)


@every_device
def test_memory_that_is_left_is_less_than_what_is_seen_and_sold(profile: Device) -> None:
    assert profile.usable_bytes < profile.visible_bytes <= profile.memory_bytes
    assert profile.usable_bytes > 0.7 * profile.memory_bytes


@every_device
def test_jetsons_share_their_memory_and_only_rtx_cards_use_tensorrt_rtx(profile: Device) -> None:
    assert profile.is_unified == (profile.kind == "jetson")
    assert profile.engine == ("tensorrt_rtx" if profile.kind == "rtx" else "tensorrt")
    assert re.fullmatch(r"\d+\.\d", profile.compute_capability)


@every_device
def test_bandwidth_is_bus_width_times_data_rate(profile: Device) -> None:
    if profile.bus_bits is None or profile.pin_bits_per_s is None:
        assert profile.bus_bits is profile.pin_bits_per_s is None
        return
    assert profile.bandwidth_bytes_per_s == pytest.approx(profile.bus_bits / 8 * profile.pin_bits_per_s, rel=0.005)


@every_device
def test_compute_is_sms_times_operations_times_clock(profile: Device) -> None:
    float16, int8 = OPERATIONS_PER_SM[profile.compute_capability, profile.kind]
    if profile.clock_hz is None:
        return
    sm_clocks = profile.num_sms * profile.clock_hz
    assert profile.fp16_flop_per_s == pytest.approx(float16 * sm_clocks, rel=TOPS_ROUNDING)
    assert (int8 is None) == (profile.int8_op_per_s is None)
    if int8 is not None:
        assert profile.int8_op_per_s == pytest.approx(int8 * sm_clocks, rel=TOPS_ROUNDING)


@every_device
def test_software_and_power_modes_are_given_for_jetsons_alone(profile: Device) -> None:
    assert (profile.software is not None) == bool(profile.power_modes) == (profile.kind == "jetson")


@jetsons
def test_no_standard_power_mode_is_faster_than_the_profile(profile: Device) -> None:
    standard = [mode for mode in profile.power_modes if not mode.is_super]
    assert max(mode.fp16_flop_per_s for mode in standard) <= (1 + TOPS_ROUNDING) * profile.fp16_flop_per_s
    known = [mode.bandwidth_bytes_per_s for mode in standard if mode.bandwidth_bytes_per_s is not None]
    assert not known or max(known) == pytest.approx(profile.bandwidth_bytes_per_s, rel=0.005)


@jetsons
def test_power_modes_have_their_own_names_and_the_watts_in_them(profile: Device) -> None:
    assert len({mode.name for mode in profile.power_modes}) == len(profile.power_modes)
    for mode in profile.power_modes:
        assert (mode.watts is None) == mode.name.startswith("MAXN")
        assert mode.watts is None or mode.name.removeprefix("MODE_") == f"{mode.watts}W"


def test_tensorrt_is_promised_for_the_modules_that_nvidia_names() -> None:
    named = {profile.name for profile in DEVICES if profile.software and profile.software.is_named}
    assert named == {"agx-orin-32", "agx-orin-64", "thor"}


def test_a_device_is_found_by_name_in_any_case() -> None:
    assert device("Orin-NX-16") is device("orin-nx-16")
    assert device("orin-nx-16").memory_bytes == 16 * GIB


@pytest.mark.parametrize("name", ["orin", "", "rtx 4080"])
def test_an_unknown_device_is_an_error_that_lists_the_names(name: str) -> None:
    with pytest.raises(ConfigError) as raised:
        device(name)
    assert repr(name) in str(raised.value)
    assert all(known in str(raised.value) for known in names())
