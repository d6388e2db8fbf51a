"""Energy: wrap-around, sharing a host's counter, GPU counters by ctypes, the declared model, and what is missing."""

# ruff: noqa: N802, N815 - the fake library has the real one's names

from __future__ import annotations

import ctypes
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from trireme_agent import processes, rapl
from trireme_agent.energy import STALE_SECONDS, Accountant, Declared, DeclaredMeter, DeclaredPower, GpuMeter, RaplMeter
from trireme_agent.nvml import Nvml, NvmlError
from trireme_api.protocol import EnergyReading

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
    now = [0.0]
    (counter,) = rapl.zones("cpu", str(tmp_path), lambda: now[0])
    assert counter.joules() == 0.0
    file.write_text(f"{SPAN - 100_000_000}\n")
    assert counter.joules() == pytest.approx(300.0)
    now[0] = 1.0
    file.write_text("200000000\n")
    assert counter.joules() == pytest.approx(600.0)
    assert len(rapl.zones("dram", str(tmp_path))) == 1
    assert rapl.zones("cpu", str(tmp_path / "nothing")) == []


def test_zones_are_found_once_in_the_flat_folder_and_in_the_tree(tmp_path: Path) -> None:
    devices, flat = tmp_path / "devices", tmp_path / "class"
    package = "intel-rapl/intel-rapl:0"
    zone(devices, package, "package-0", 1)
    zone(devices, f"{package}/intel-rapl:0:0", "dram", 1)
    flat.mkdir()
    (flat / "intel-rapl").symlink_to(devices / "intel-rapl")
    (flat / "intel-rapl:0").symlink_to(devices / package)
    (flat / "intel-rapl:0:0").symlink_to(devices / package / "intel-rapl:0:0")
    for root in (devices, flat):
        assert [len(rapl.zones(name, str(root))) for name in ("cpu", "dram")] == [1, 1]


def test_a_rapl_counter_that_is_set_back_is_not_one_that_wraps(tmp_path: Path) -> None:
    file = zone(tmp_path, "intel-rapl:0", "package-0", 900_000_000_000)
    (tmp_path / "intel-rapl:0" / "max_energy_range_uj").write_text("999000000000\n")
    now = [0.0]
    (counter,) = rapl.zones("cpu", str(tmp_path), lambda: now[0])
    now[0] = 1.0
    file.write_text("5000000\n")  # a wrap would be 99 kJ in a second
    assert counter.joules() == pytest.approx(5.0)
    now[0] = 2.0
    file.write_text("8000000\n")
    assert counter.joules() == pytest.approx(8.0)


def test_a_clock_that_stands_still_or_goes_back_makes_no_energy(tmp_path: Path) -> None:
    now = [100.0]
    power = GpuMeter(Nvml({}, FakeNvml(None, [100_000])), lambda: now[0])
    declared = DeclaredPower(lambda: 50.0, lambda: now[0])
    for meter in (power, declared):
        now[0] = 100.0
        meter.sample()
        now[0] = 90.0
        meter.sample()
        assert meter.joules == 0.0
        now[0] = 92.0
        meter.sample()
        assert 0 < (meter.joules or 0.0) <= 200.0


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
    """The functions of libnvidia-ml as ctypes calls them: results through pointers, 0 or an error as return value."""

    def __init__(self, energy: list[int] | None, power: list[int] | None, mig: int | None = None) -> None:
        self.energy, self.power, self.mig = energy, power, mig
        """Millijoules and milliwatts by GPU; None: NVML_ERROR_NOT_SUPPORTED."""
        self.opened: list[Any] = []

    def nvmlInit_v2(self) -> int:
        return 0

    def _count(self) -> int:
        return len(self.power or self.energy or [])

    def nvmlDeviceGetCount_v2(self, out: Any) -> int:
        out._obj.value = self._count()
        return 0

    def nvmlDeviceGetHandleByIndex_v2(self, index: ctypes.c_uint, out: Any) -> int:
        self.opened.append(index.value)
        out._obj.value = index.value + 1
        return 0 if index.value < self._count() else 6

    def nvmlDeviceGetHandleByUUID(self, uuid: ctypes.c_char_p, out: Any) -> int:
        self.opened.append(uuid.value)
        out._obj.value = 1
        return 0

    def nvmlDeviceGetName(self, handle: ctypes.c_void_p, out: Any, length: ctypes.c_uint) -> int:
        assert len(out) == length.value
        out.value = b"NVIDIA H100 80GB HBM3"
        return 0

    def nvmlDeviceGetMigMode(self, handle: ctypes.c_void_p, current: Any, pending: Any) -> int:
        if self.mig is None:
            return 3
        current._obj.value = pending._obj.value = self.mig
        return 0

    def nvmlDeviceGetTotalEnergyConsumption(self, handle: ctypes.c_void_p, out: Any) -> int:
        if self.energy is None:
            return 3
        out._obj.value = self.energy[(handle.value or 0) - 1]
        return 0

    def nvmlDeviceGetPowerUsage(self, handle: ctypes.c_void_p, out: Any) -> int:
        if self.power is None:
            return 3
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


@pytest.mark.parametrize(
    ("environ", "opened"),
    [
        ({"NVIDIA_VISIBLE_DEVICES": "GPU-a,GPU-b"}, [b"GPU-a", b"GPU-b"]),
        ({"NVIDIA_VISIBLE_DEVICES": "5"}, [0, 1]),
        ({"NVIDIA_VISIBLE_DEVICES": "all"}, [0, 1]),
        ({"NVIDIA_VISIBLE_DEVICES": "GPU-a", "CUDA_VISIBLE_DEVICES": "1"}, [1]),
    ],
)
def test_what_the_device_plugin_gave(environ: dict[str, str], opened: list[Any]) -> None:
    fake = FakeNvml([1, 2], [1, 2])
    Nvml(environ, fake)
    assert fake.opened == opened


def test_a_counter_that_stands_at_zero_is_none() -> None:
    meter = GpuMeter(Nvml({}, FakeNvml([0], [100_000])))
    assert meter.source == "nvml-power"


def test_a_slice_of_a_gpu_does_not_get_the_whole_ones_energy() -> None:
    assert GpuMeter(Nvml({}, FakeNvml([5000], [100_000], mig=0))).source == "nvml"
    meter = GpuMeter(Nvml({}, FakeNvml([5000], [100_000], mig=1)))
    meter.sample()
    assert (meter.joules, meter.source) == (None, "missing")


def test_a_driver_too_old_for_a_function_is_an_error_not_a_crash() -> None:
    class Old(FakeNvml):
        nvmlDeviceGetMigMode = nvmlDeviceGetName = property()  # type: ignore[assignment]

    nvml = Nvml({}, Old([1000], [5]))
    assert nvml.model() is None
    assert nvml.energy_joules() == [1.0]


def accountant(root: Path, watts: float | None, gpus: list[str], **more: Any) -> Accountant:
    def absent(environ: Mapping[str, str]) -> Nvml:
        raise NvmlError("libnvidia-ml.so.1: cannot open shared object file")

    given = {"open_nvml": absent, "memory": lambda: None, **more}
    return Accountant(
        Declared(per_core=watts, per_gigabyte=given.pop("per_gigabyte", None), per_gpu=given.pop("per_gpu", None)), {},
        cpu_seconds=lambda: 4.0, busy=lambda: 8.0, rapl_root=str(root), gpus=gpus, **given,
    )  # fmt: skip


def test_sources_are_chosen_and_what_cannot_be_read_is_missing_not_zero(tmp_path: Path) -> None:
    nothing = accountant(tmp_path, None, ["/dev/nvidia0"])
    assert "gpu" not in nothing.readings(), "the driver has not been asked yet"
    nothing.find_gpus()
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


def test_the_gpus_sources_in_their_order(tmp_path: Path) -> None:
    now = [0.0]

    def read(fake: FakeNvml, watts: float | None = None) -> tuple[float | None, str]:
        now[0] = 0.0
        one = accountant(
            tmp_path, None, ["/dev/nvidia0", "/dev/nvidia1"], open_nvml=lambda environ: Nvml(environ, fake),
            clock=lambda: now[0], per_gpu=watts,
        )  # fmt: skip
        one.find_gpus()
        now[0] = 2.0
        if fake.energy is not None:
            fake.energy = [value + 4000 for value in fake.energy]
        one.sample()
        assert (one.hardware().gpus, one.hardware().gpu_model) == (2, "NVIDIA H100 80GB HBM3")
        assert one.hardware().seconds == 2.0
        return one.readings()["gpu"].joules, one.readings()["gpu"].source

    assert read(FakeNvml([1000, 2000], [7000, 7000]), 700.0) == (8.0, "nvml")
    assert read(FakeNvml(None, [7000, 7000]), 700.0) == (28.0, "nvml-power")
    assert read(FakeNvml([1000, 2000], [7000, 7000], mig=1), 700.0) == (2800.0, "declared")
    assert read(FakeNvml([1000, 2000], [7000, 7000], mig=1)) == (None, "missing")


def test_memory_in_use_where_it_is_declared(tmp_path: Path) -> None:
    now = [0.0]
    one = accountant(tmp_path, None, [], per_gigabyte=0.375, memory=lambda: 8_000_000_000, clock=lambda: now[0])
    now[0] = 10.0
    one.sample()
    assert (one.readings()["dram"].joules, one.readings()["dram"].source) == (pytest.approx(30.0), "declared")


def test_a_counter_that_can_no_longer_be_read_says_so(tmp_path: Path) -> None:
    now, fake = [1.0], FakeNvml([1000], [7000])
    one = accountant(
        tmp_path, None, ["/dev/nvidia0"], open_nvml=lambda environ: Nvml(environ, fake), clock=lambda: now[0]
    )
    one.find_gpus()
    fake.energy = None
    one.sample()
    assert one.readings()["gpu"].stale is None, "most come back"
    now[0] += STALE_SECONDS + 1
    one.sample()
    assert one.readings()["gpu"] == EnergyReading(0.0, "nvml", True)
    fake.energy = [9000]
    one.sample()
    assert one.readings()["gpu"] == EnergyReading(8.0, "nvml")


def test_a_driver_that_does_not_answer_is_missing_and_holds_up_nobody(tmp_path: Path) -> None:
    now, let_go = [0.0], threading.Event()

    def stuck(environ: Mapping[str, str]) -> Nvml:
        let_go.wait(30)
        raise NvmlError("at last")

    one = accountant(tmp_path, 5.0, ["/dev/nvidia0"], open_nvml=stuck, clock=lambda: now[0])
    one.start()
    try:
        assert "gpu" not in one.readings()
        now[0] = 31.0
        assert one.readings()["gpu"] == EnergyReading(None, "missing")
        one.sample(("cpu",))
        assert one.readings()["cpu"].joules == 20.0
    finally:
        let_go.set()
        one.close()


def test_cpu_seconds_are_those_of_this_process_and_its_children_only() -> None:
    before = processes.cpu_seconds()
    sum(i * i for i in range(2_000_000))
    used = processes.cpu_seconds() - before
    busy = processes.host_busy_seconds()
    assert 0.01 < used < 60
    assert busy is not None
    assert busy > used
