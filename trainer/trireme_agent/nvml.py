"""GPU counters through the driver's own library, loaded at run time: no package, no helper process."""

from __future__ import annotations

import ctypes
import glob
from typing import Any, List, Mapping, Optional

LIBRARY = "libnvidia-ml.so.1"


class NvmlError(Exception):
    pass


def gpu_devices(pattern: str = "/dev/nvidia[0-9]*") -> List[str]:
    """Device files of GPUs this process can see; empty on a machine (or in a pod) without any."""
    return sorted(glob.glob(pattern))


class Nvml:
    """The GPUs of this pod. In a container the runtime shows no others; CUDA_VISIBLE_DEVICES narrows it further."""

    def __init__(self, environ: Mapping[str, str], library: Optional[Any] = None) -> None:
        """Raises NvmlError."""
        if library is None:
            try:
                library = ctypes.CDLL(LIBRARY)
            except OSError as error:
                raise NvmlError(str(error)) from None
        self._lib = library
        self._check(self._lib.nvmlInit_v2(), "nvmlInit")
        self._handles = self._find(environ.get("CUDA_VISIBLE_DEVICES"))

    def _check(self, code: int, what: str) -> None:
        if code != 0:
            raise NvmlError(f"{what} returned {code}")

    def _find(self, visible: Optional[str]) -> List[ctypes.c_void_p]:
        if visible is None or visible.strip() == "all":
            count = ctypes.c_uint()
            self._check(self._lib.nvmlDeviceGetCount_v2(ctypes.byref(count)), "nvmlDeviceGetCount")
            names = [str(index) for index in range(count.value)]
        else:
            names = [name.strip() for name in visible.split(",") if name.strip() and name.strip() != "-1"]
        handles = []
        for name in names:
            handle = ctypes.c_void_p()
            if name.isdigit():
                code = self._lib.nvmlDeviceGetHandleByIndex_v2(ctypes.c_uint(int(name)), ctypes.byref(handle))
            else:
                code = self._lib.nvmlDeviceGetHandleByUUID(ctypes.c_char_p(name.encode()), ctypes.byref(handle))
            self._check(code, f"nvmlDeviceGetHandle({name})")
            handles.append(handle)
        return handles

    def __len__(self) -> int:
        return len(self._handles)

    def energy_joules(self) -> List[float]:
        """Per GPU, since its driver was loaded (the counter is in millijoules; Volta and newer). Raises NvmlError."""
        values = []
        for handle in self._handles:
            value = ctypes.c_ulonglong()
            self._check(self._lib.nvmlDeviceGetTotalEnergyConsumption(handle, ctypes.byref(value)), "TotalEnergy")
            values.append(value.value / 1000.0)
        return values

    def power_watts(self) -> List[float]:
        """Per GPU, the driver's newest average. Raises NvmlError."""
        values = []
        for handle in self._handles:
            value = ctypes.c_uint()
            self._check(self._lib.nvmlDeviceGetPowerUsage(handle, ctypes.byref(value)), "PowerUsage")
            values.append(value.value / 1000.0)
        return values
