"""Energy: wrap-around, sharing a host's counter, GPU counters by ctypes, the declared model, and what is missing."""

# ruff: noqa: N802 - the fake library has the real one's names

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import pytest
from trireme_agent import processes, rapl
from trireme_agent.energy import Accountant, DeclaredMeter, GpuMeter, RaplMeter
from trireme_agent.nvml import Nvml, NvmlError

SPAN = 1_000_000_000


def zone(root: Path, folder: str, name: str, value: int) -> Path:
    path = root / folder
    path.mkdir(parents=True, exist_ok=True)
    (path / "name").write_text(name + "\n")
    (path / "max_energy_range_uj").write_text(f"{SPAN}\n")
    (path / "energy_uj").write_text(f"{value}\n")
    return path / "energy_uj"


def test_a_rapl_counter_that_wraps_goes_on(tmp_path: Path) -> None:
    file = zone(tmp_path, "intel-rapl:0", "package-0", SPAN - 400_000_000)
    zone(tmp_path, "intel-rapl:0:0", "core", 5)
    zone(tmp_path, "intel-rapl:0:1", "dram", 7)
    (counter,) = rapl.zones("cpu", str(tmp_path))
    assert counter.joules() == 0.0
    file.write_text(f"{SPAN - 100_000_000}\n")
    assert counter.joules() == pytest.approx(300.0)
    file.write_text("200000000\n")
    assert counter.joules() == pytest.approx(600.0)
    assert len(rapl.zones("dram", str(tmp_path))) == 1
    assert rapl.zones("cpu", str(tmp_path / "nothing")) == []


def test_a_pod_gets_its_share_of_the_hosts_energy(tmp_path: Path) -> None:
    file = zone(tmp_path, "intel-rapl:0", "package-0", 0)
    own, busy = [0.0], [100.0]
    meter = RaplMeter(rapl.zones("cpu", str(tmp_path)), lambda: own[0], lambda: busy[0])
    file.write_text("100000000\n")
    own[0], busy[0] = 1.0, 104.0
    meter.sample()
    assert meter.joules == pytest.approx(25.0)
    file.write_text("140000000\n")
    meter.sample()  # the host's clock has not ticked: nothing is lost, nothing divided by zero
    own[0], busy[0] = 3.0, 106.0
    meter.sample()
    assert meter.joules == pytest.approx(65.0)
    own[0], busy[0] = 99.0, 107.0
    file.write_text("150000000\n")
    meter.sample()
    assert meter.joules == pytest.approx(75.0), "never more than all of it"


class FakeNvml:
    """The library's functions as ctypes calls them."""

    def __init__(self, energy: list[int] | None, power: list[int]) -> None:
        self.energy, self.power = energy, power
        self.opened: list[Any] = []

    def nvmlInit_v2(self) -> int:
        return 0

    def nvmlDeviceGetCount_v2(self, out: Any) -> int:
        out._obj.value = len(self.power)
        return 0

    def nvmlDeviceGetHandleByIndex_v2(self, index: ctypes.c_uint, out: Any) -> int:
        self.opened.append(index.value)
        out._obj.value = index.value + 1
        return 0 if index.value < len(self.power) else 6

    def nvmlDeviceGetHandleByUUID(self, uuid: ctypes.c_char_p, out: Any) -> int:
        self.opened.append(uuid.value)
        out._obj.value = 1
        return 0

    def nvmlDeviceGetTotalEnergyConsumption(self, handle: ctypes.c_void_p, out: Any) -> int:
        if self.energy is None:
            return 3
        out._obj.value = self.energy[(handle.value or 0) - 1]
        return 0

    def nvmlDeviceGetPowerUsage(self, handle: ctypes.c_void_p, out: Any) -> int:
        out._obj.value = self.power[(handle.value or 0) - 1]
        return 0


def test_the_gpus_energy_counters_are_differences_in_joules() -> None:
    fake = FakeNvml([5_000_000, 7_000_000], [0, 0])
    meter = GpuMeter(Nvml({}, fake))
    assert (meter.joules, meter.source) == (0.0, "nvml")
    fake.energy = [5_001_500, 7_000_500]
    meter.sample()
    assert meter.joules == pytest.approx(2.0)
    fake.energy = [250, 7_000_500]  # one GPU's driver was reloaded
    meter.sample()
    assert meter.joules == pytest.approx(2.25)
    fake.energy = None
    meter.sample()
    assert meter.joules == pytest.approx(2.25)


def test_power_is_integrated_where_there_is_no_counter() -> None:
    now = [0.0]
    fake = FakeNvml(None, [100_000])
    meter = GpuMeter(Nvml({}, fake), lambda: now[0])
    assert (meter.joules, meter.source) == (0.0, "nvml-power")
    now[0], fake.power = 2.0, [300_000]
    meter.sample()
    assert meter.joules == pytest.approx(400.0)


@pytest.mark.parametrize(
    ("visible", "opened"),
    [(None, [0, 1]), ("1", [1]), ("GPU-abc", [b"GPU-abc"]), ("", []), ("-1", [])],
)
def test_only_the_gpus_of_this_pod(visible: str | None, opened: list[Any]) -> None:
    fake = FakeNvml([1, 2], [1, 2])
    nvml = Nvml({} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}, fake)
    assert (fake.opened, len(nvml)) == (opened, len(opened))


def test_a_gpu_that_is_not_there_is_an_error() -> None:
    with pytest.raises(NvmlError, match="5"):
        Nvml({"CUDA_VISIBLE_DEVICES": "5"}, FakeNvml([1], [1]))


def test_the_declared_model_never_runs_backwards() -> None:
    seconds = [10.0]
    meter = DeclaredMeter(7.5, lambda: seconds[0])
    meter.sample()
    seconds[0] = 8.0
    meter.sample()
    assert (meter.joules, meter.source) == (75.0, "declared")


def accountant(root: Path, watts: float | None, gpus: list[str]) -> Accountant:
    return Accountant(watts, {}, cpu_seconds=lambda: 4.0, busy=lambda: 8.0, rapl_root=str(root), gpus=gpus)


def test_sources_are_chosen_and_what_cannot_be_read_is_missing_not_zero(tmp_path: Path) -> None:
    nothing = accountant(tmp_path, None, ["/dev/nvidia0"])
    nothing.sample()
    assert {name: (r.joules, r.source) for name, r in nothing.readings().items()} == {
        "cpu": (None, "missing"), "dram": (None, "missing"), "gpu": (None, "missing"),
    }  # fmt: skip
    declared = accountant(tmp_path, 5.0, [])
    declared.sample()
    readings = declared.readings()
    assert (readings["cpu"].joules, readings["cpu"].source) == (20.0, "declared")
    assert "gpu" not in readings, "a pod without GPUs has no GPU energy to miss"
    zone(tmp_path, "intel-rapl:0", "package-0", 0)
    assert accountant(tmp_path, 5.0, []).readings()["cpu"].source == "rapl"


def test_cpu_seconds_are_those_of_this_process_and_its_children_only() -> None:
    before = processes.cpu_seconds()
    sum(i * i for i in range(2_000_000))
    used = processes.cpu_seconds() - before
    busy = processes.host_busy_seconds()
    assert 0.01 < used < 60
    assert busy is not None
    assert busy > used
