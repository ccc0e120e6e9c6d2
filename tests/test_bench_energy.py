"""Meters of energy on made-up sysfs trees and a made-up NVML: what is added up, what is not, and what is said where
nothing can be read. Joules are compared with sums worked out by hand. Needs neither hardware nor torch."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from vlmdeploy.bench.energy import Integral, Meter, Unknown, find_meter, jetson_meter, nvml_meter, rapl_meter
from vlmdeploy.errors import BackendError

RANGE_UJ = 65_532_610_987
ORIN_NX = {"VDD_IN": (5000, 2000), "VDD_CPU_GPU_CV": (5000, 800), "VDD_SOC": (5000, 400)}
AGX_ORIN = {"VDD_GPU_SOC": (19000, 300), "VDD_CPU_CV": (19000, 100), "VIN_SYS_5V0": (5000, 900)}


def write_zone(root: Path, zone: str, name: str, energy_uj: object, range_uj: object = RANGE_UJ) -> Path:
    """One domain of RAPL, as powercap shows it."""
    folder = root / "class/powercap" / zone
    folder.mkdir(parents=True)
    for file, content in (("name", name), ("energy_uj", energy_uj), ("max_energy_range_uj", range_uj)):
        (folder / file).write_text(f"{content}\n")
    return folder


def write_rails(root: Path, rails: dict[str, tuple[int, int]], chip: str = "hwmon3") -> Path:
    """An INA3221 whose channels are label -> (millivolts, milliamperes)."""
    folder = root / "class/hwmon" / chip
    folder.mkdir(parents=True)
    (folder / "name").write_text("ina3221\n")
    for channel, (label, (millivolts, milliamperes)) in enumerate(rails.items(), 1):
        (folder / f"in{channel}_label").write_text(f"{label}\n")
        (folder / f"in{channel}_input").write_text(f"{millivolts}\n")
        (folder / f"curr{channel}_input").write_text(f"{milliamperes}\n")
    return folder


def opened(meter: Meter | Unknown | None) -> Meter:
    """The meter, its thread ended: tests read by themselves."""
    assert meter is not None and not isinstance(meter, Unknown), meter
    meter.close()
    return meter


def reason(meter: Meter | Unknown | None) -> str:
    assert isinstance(meter, Unknown), "a meter, where there should be none"
    return meter.reason


class FakeClock:
    """Seconds, as tests set them."""

    seconds = 0.0

    def __call__(self) -> float:
        return self.seconds


def joules_of_two_seconds(meter: Meter, clock: FakeClock) -> float:
    before = meter.joules()
    clock.seconds += 2
    return meter.joules() - before


# RAPL


def test_counter_counts_from_the_beginning_and_over_its_end(tmp_path: Path) -> None:
    zone = write_zone(tmp_path, "intel-rapl:0", "package-0", RANGE_UJ - 1_000_000)
    meter = opened(rapl_meter(tmp_path))
    assert meter.joules() == 0
    (zone / "energy_uj").write_text("2999999\n")  # 1 J up to the end, one step over it, then 2,999,999 steps
    assert meter.joules() == pytest.approx(4.0, abs=1e-9)
    (zone / "energy_uj").write_text("3999999\n")
    assert meter.joules() == pytest.approx(5.0, abs=1e-9)


def test_packages_and_their_memory_are_added_and_parts_of_a_package_are_not(tmp_path: Path) -> None:
    zones = {
        "intel-rapl:0": "package-0", "intel-rapl:0:0": "core", "intel-rapl:0:1": "dram", "intel-rapl:1": "package-1",
        "intel-rapl:1:0": "uncore", "intel-rapl:1:1": "dram", "intel-rapl:2": "psys", "intel-rapl-mmio:0": "package-0",
    }  # fmt: skip
    folders = [write_zone(tmp_path, zone, name, 0) for zone, name in zones.items()]
    meter = opened(rapl_meter(tmp_path))
    for power, folder in enumerate(folders):
        (folder / "energy_uj").write_text(str(10**power * 1_000_000))
    assert meter.joules() == pytest.approx(1 + 100 + 1000 + 100_000)
    assert "package-0 + dram + package-1 + dram" in meter.method


def test_counter_that_only_root_may_read_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests may run as root, whom no file mode keeps out."""
    zone = write_zone(tmp_path, "intel-rapl:0", "package-0", 5)
    read = Path.read_text

    def refuse(path: Path, *rest: Any, **options: Any) -> str:
        if path.name == "energy_uj":
            raise PermissionError(13, "Permission denied", str(path))
        return read(path, *rest, **options)

    monkeypatch.setattr(Path, "read_text", refuse)
    assert reason(rapl_meter(tmp_path)) == f"{zone / 'energy_uj'}: only root may read it here"


@pytest.mark.parametrize("content", ["", "many", "1.5", "\udcff"])
def test_counter_without_a_number_is_named(tmp_path: Path, content: str) -> None:
    zone = write_zone(tmp_path, "intel-rapl:0", "package-0", 5)
    (zone / "energy_uj").write_bytes(content.encode(errors="surrogateescape"))
    assert reason(rapl_meter(tmp_path)).startswith(f"{zone / 'energy_uj'}: found ")


@pytest.mark.parametrize("missing", ["energy_uj", "max_energy_range_uj"])
def test_missing_file_of_a_counter_is_named(tmp_path: Path, missing: str) -> None:
    zone = write_zone(tmp_path, "intel-rapl:0", "package-0", 5)
    (zone / missing).unlink()
    assert reason(rapl_meter(tmp_path)) == f"{zone / missing}: No such file or directory"


def test_machine_without_counters_says_so(tmp_path: Path) -> None:
    assert "no energy counter" in reason(find_meter(False, tmp_path))
    write_zone(tmp_path, "intel-rapl:0", "psys", 5)
    assert "no energy counter" in reason(find_meter(False, tmp_path))


def test_counter_that_goes_away_is_one_clear_error(tmp_path: Path) -> None:
    zone = write_zone(tmp_path, "intel-rapl:0", "package-0", 5)
    meter = opened(rapl_meter(tmp_path))
    (zone / "energy_uj").unlink()
    with pytest.raises(BackendError, match="stopped answering"):
        meter.joules()


# Jetson


def test_rail_that_feeds_the_module_is_the_whole_power(tmp_path: Path) -> None:
    write_rails(tmp_path, ORIN_NX)
    clock = FakeClock()
    meter = opened(jetson_meter(tmp_path, clock))
    assert opened(find_meter(True, tmp_path)).method == meter.method
    assert "power of the module, VDD_IN (INA3221)" in meter.method
    assert joules_of_two_seconds(meter, clock) == pytest.approx(20.0)  # 5 V, 2 A, 2 s


def test_separate_rails_are_added(tmp_path: Path) -> None:
    write_rails(tmp_path, AGX_ORIN)
    write_rails(tmp_path, {"VDDQ_VDD2_1V8AO": (5000, 300)}, "hwmon4")  # fed by VIN_SYS_5V0
    clock = FakeClock()
    meter = opened(jetson_meter(tmp_path, clock))
    assert "VDD_CPU_CV + VDD_GPU_SOC + VIN_SYS_5V0" in meter.method
    assert joules_of_two_seconds(meter, clock) == pytest.approx(2 * (5.7 + 1.9 + 4.5))


def test_rails_that_are_not_known_to_add_up_are_named(tmp_path: Path) -> None:
    write_rails(tmp_path, {"VDD_GPU_SOC": (5000, 1), "VDD_NEW": (5000, 1)})
    assert "INA3221 rails VDD_GPU_SOC, VDD_NEW are not known to add up" in reason(find_meter(True, tmp_path))


def test_rail_without_current_is_named(tmp_path: Path) -> None:
    chip = write_rails(tmp_path, ORIN_NX)
    (chip / "curr1_input").unlink()
    assert reason(jetson_meter(tmp_path)) == f"{chip / 'curr1_input'}: No such file or directory"


def test_other_sensors_are_no_rails(tmp_path: Path) -> None:
    chip = write_rails(tmp_path, ORIN_NX)
    (chip / "name").write_text("k10temp\n")
    assert jetson_meter(tmp_path) is None


def test_power_is_integrated_by_trapezoids() -> None:
    times, watts = iter([0.0, 1.0, 3.0]), iter([10.0, 20.0, 0.0])
    power = Integral(lambda: next(watts), lambda: next(times))
    assert [power.read(), power.read()] == [15.0, 35.0]  # 1 s at 15 W, then 2 s at 10 W


# NVML


class FakeNvmlError(Exception):
    """Like pynvml.NVMLError."""


def fake_nvml(**functions: Any) -> SimpleNamespace:
    """The part of pynvml that is used, of one GPU; `functions` replace some. What is None is not supported."""
    energy = iter(range(1000, 100_000, 2500))
    default = {
        "nvmlInit": lambda: None, "nvmlDeviceGetCount": lambda: 1, "nvmlDeviceGetHandleByIndex": lambda index: "gpu",
        "nvmlDeviceGetName": lambda gpu: "RTX 4060", "nvmlDeviceGetPowerUsage": lambda gpu: 115_000,
        "nvmlDeviceGetTotalEnergyConsumption": lambda gpu: next(energy),
    }  # fmt: skip

    def refuse(*arguments: object) -> int:
        raise FakeNvmlError("Not Supported")

    named = {name: refuse if function is None else function for name, function in (default | functions).items()}
    return SimpleNamespace(NVMLError=FakeNvmlError, **named)


def test_board_counts_millijoules() -> None:
    meter = opened(nvml_meter(fake_nvml()))
    assert meter.method == "NVML's energy counter of the board, RTX 4060"
    assert [meter.joules(), meter.joules()] == [2.5, 5.0]


def test_board_without_a_counter_is_sampled() -> None:
    clock = FakeClock()
    meter = opened(nvml_meter(fake_nvml(nvmlDeviceGetTotalEnergyConsumption=None), clock))
    assert meter.method == "NVML's power of the board, RTX 4060, sampled every 20 ms"
    assert joules_of_two_seconds(meter, clock) == pytest.approx(230.0)


@pytest.mark.parametrize(("functions", "expected"), [
    ({"nvmlInit": None}, "NVML: Not Supported"),
    ({"nvmlDeviceGetCount": lambda: 2}, "NVML sees 2 GPUs"),
    ({"nvmlDeviceGetCount": lambda: 0}, "NVML sees 0 GPUs"),
    ({"nvmlDeviceGetTotalEnergyConsumption": None, "nvmlDeviceGetPowerUsage": None}, "NVML: Not Supported"),
])  # fmt: skip
def test_board_that_cannot_be_read_says_why(functions: dict[str, Any], expected: str) -> None:
    assert reason(nvml_meter(fake_nvml(**functions))).startswith(expected)
