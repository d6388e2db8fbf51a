"""Dense peak arithmetic of accelerators, for MFU: a device that is not here has none, never a guess. And boards to plan
with: their memory, links and power, by data sheet."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Precision = Literal["fp32", "bf16", "fp16"]


@dataclass(frozen=True)
class DevicePeak:
    """FLOP/s without sparsity, as the maker's data sheet prints them. None: the device has no such units.

    `fp32` is the ordinary fp32 rate: torch multiplies fp32 matrices without TF32 unless told otherwise.
    """

    bf16: float | None
    fp32: float
    source: str

    def of(self, precision: Precision) -> float | None:
        # On all of these fp16 tensor units have the rate of bf16.
        return self.fp32 if precision == "fp32" else self.bf16


_H100 = "NVIDIA H100 Tensor Core GPU data sheet"
_H200 = "NVIDIA H200 Tensor Core GPU data sheet"
_A100 = "NVIDIA A100 Tensor Core GPU data sheet"
_TERA = 1e12

# Data sheets print tensor figures with sparsity from Hopper on; these are the halves. A name matches by
# whole words, and the first match wins, so the narrower name stands first.
_PEAKS: tuple[tuple[tuple[str, ...], DevicePeak], ...] = (
    (("GH200",), DevicePeak(989.4 * _TERA, 66.9 * _TERA, "NVIDIA GH200 Grace Hopper Superchip data sheet")),
    (("H200", "NVL"), DevicePeak(835.5 * _TERA, 60 * _TERA, _H200)),
    (("H200",), DevicePeak(989.4 * _TERA, 66.9 * _TERA, _H200)),
    (("H100", "PCIe"), DevicePeak(756.0 * _TERA, 51.2 * _TERA, _H100)),
    (("H100", "NVL"), DevicePeak(835.5 * _TERA, 60 * _TERA, _H100)),
    (("H100",), DevicePeak(989.4 * _TERA, 66.9 * _TERA, _H100)),
    (("A100",), DevicePeak(312.0 * _TERA, 19.5 * _TERA, _A100)),
    (("L40S",), DevicePeak(362.05 * _TERA, 91.6 * _TERA, "NVIDIA L40S data sheet")),
    (("A10G",), DevicePeak(None, 31.5 * _TERA, "AWS G5 / NVIDIA A10G: fp32 only; no dense bf16 figure is published")),
    (("A10",), DevicePeak(125.0 * _TERA, 31.2 * _TERA, "NVIDIA A10 data sheet")),
    (("L4",), DevicePeak(121.0 * _TERA, 30.3 * _TERA, "NVIDIA L4 data sheet")),
    (("V100",), DevicePeak(None, 15.7 * _TERA, "NVIDIA V100 data sheet (SXM2); no bf16 units")),
    (("T4",), DevicePeak(None, 8.1 * _TERA, "NVIDIA T4 data sheet; no bf16 units")),
    (("MI300X",), DevicePeak(1307.4 * _TERA, 163.4 * _TERA, "AMD Instinct MI300X data sheet")),
    (("MI250X",), DevicePeak(383.0 * _TERA, 47.9 * _TERA, "AMD Instinct MI250X data sheet")),
)


def device_peak(name: str) -> DevicePeak | None:
    """By the name the driver gives (`torch.cuda.get_device_name()`); None for a device that is not in the table."""
    words = name.replace("-", " ").split()
    for parts, peak in _PEAKS:
        if all(part in words for part in parts):
            return peak
    return None


@dataclass(frozen=True)
class Board:
    """A device that a plan can be made for, in the machine it usually comes in."""

    name: str
    driver: str
    """As the driver names it: what peak arithmetic and embodied carbon are looked up by."""
    gibibytes: float
    memory_bandwidth: float
    """Bytes per second."""
    link: float
    """Bytes per second, one direction, to the other GPUs of the machine."""
    network: float
    """Bytes per second, one direction, out of the machine, for each of its GPUs."""
    per_node: int
    watts: float
    """Board power, its limit."""
    host_watts: float
    """The most that the rest of the machine draws, for each GPU."""
    source: str

    @property
    def peak(self) -> DevicePeak | None:
        return device_peak(self.driver)


_GIGA = 1e9
_DGX_H100 = "DGX H100/H200 data sheet: 10.2 kW, NVLink 900 GB/s both ways, 8 x 400 Gb/s"
_DGX_A100 = "DGX A100 data sheet: 6.5 kW, NVLink 600 GB/s both ways, 8 x 200 Gb/s"
_PCIE = "PCIe 4.0 x16; network (100 Gb/s for 8) and host assumed"

BOARDS: dict[str, Board] = {
    board.name: board
    for board in (
        Board("h200", "NVIDIA H200", 141, 4.8e12, 450 * _GIGA, 50 * _GIGA, 8, 700, 575, f"{_H200}; {_DGX_H100}"),
        Board("h100", "NVIDIA H100", 80, 3.35e12, 450 * _GIGA, 50 * _GIGA, 8, 700, 575, f"{_H100}; {_DGX_H100}"),
        Board("a100-80", "NVIDIA A100", 80, 2.039e12, 300 * _GIGA, 25 * _GIGA, 8, 400, 412, f"{_A100}; {_DGX_A100}"),
        Board("a100-40", "NVIDIA A100", 40, 1.555e12, 300 * _GIGA, 25 * _GIGA, 8, 400, 412, f"{_A100}; {_DGX_A100}"),
        Board("l40s", "NVIDIA L40S", 48, 864 * _GIGA, 32 * _GIGA, 1.56 * _GIGA, 8, 350, 200, f"L40S sheet; {_PCIE}"),
        Board("a10", "NVIDIA A10", 24, 600 * _GIGA, 32 * _GIGA, 1.56 * _GIGA, 4, 150, 150, f"A10 data sheet; {_PCIE}"),
        Board("l4", "NVIDIA L4", 24, 300 * _GIGA, 32 * _GIGA, 1.56 * _GIGA, 8, 72, 100, f"L4 data sheet; {_PCIE}"),
        Board(
            "mi300x", "AMD Instinct MI300X", 192, 5.3e12, 448 * _GIGA, 50 * _GIGA, 8, 750, 575,
            "AMD Instinct MI300X data sheet; network and host assumed as in DGX H100",
        ),
    )
}  # fmt: skip
