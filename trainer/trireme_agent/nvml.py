"""GPU counters through the driver's own library, loaded at run time: no package, no helper process."""

from __future__ import annotations

import ctypes
import glob
from typing import Any, List, Mapping, Optional

LIBRARY = "libnvidia-ml.so.1"
NAME_BYTES = 96
"""NVML_DEVICE_NAME_V2_BUFFER_SIZE"""


class NvmlError(Exception):
    pass


def gpu_devices(pattern: str = "/dev/nvidia[0-9]*") -> List[str]:
    """Device files of GPUs this process can see; empty on a machine (or in a pod) without any."""
    return sorted(glob.glob(pattern))


def own_gpus(environ: Mapping[str, str]) -> Optional[List[str]]:
    """The GPUs of this pod, by index or UUID; None: all that can be seen.

    CUDA_VISIBLE_DEVICES is what the ranks use. NVIDIA_VISIBLE_DEVICES is what the device plugin gave: its UUIDs count
    where the container sees more than it was given; its indices are the host's and mean nothing in here.
    """
    visible = environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None and visible.strip() != "all":
        return [name.strip() for name in visible.split(",") if name.strip() and name.strip() != "-1"]
    given = [name.strip() for name in environ.get("NVIDIA_VISIBLE_DEVICES", "").split(",")]
    return given if all(name.startswith(("GPU-", "MIG-")) for name in given) else None


class Nvml:
    """The GPUs of this pod."""

    def __init__(self, environ: Mapping[str, str], library: Optional[Any] = None) -> None:
        """Raises NvmlError."""
        if library is None:
            try:
                library = ctypes.CDLL(LIBRARY)
            except OSError as error:
                raise NvmlError(str(error)) from None
        self._lib = library
        self._call("nvmlInit_v2")
        self._handles = [self._handle(name) for name in self._names(own_gpus(environ))]
        self._sliced = any(self._is_sliced(handle) for handle in self._handles)

    def _call(self, function: str, *arguments: Any) -> None:
        try:
            code = getattr(self._lib, function)(*arguments)
        except AttributeError:
            raise NvmlError(f"this driver has no {function}") from None
        if code != 0:
            raise NvmlError(f"{function} returned {code}")

    def _names(self, own: Optional[List[str]]) -> List[str]:
        if own is not None:
            return own
        count = ctypes.c_uint()
        self._call("nvmlDeviceGetCount_v2", ctypes.byref(count))
        return [str(index) for index in range(count.value)]

    def _handle(self, name: str) -> ctypes.c_void_p:
        handle = ctypes.c_void_p()
        try:
            if name.isdigit():
                self._call("nvmlDeviceGetHandleByIndex_v2", ctypes.c_uint(int(name)), ctypes.byref(handle))
            else:
                self._call("nvmlDeviceGetHandleByUUID", ctypes.c_char_p(name.encode()), ctypes.byref(handle))
        except NvmlError as error:
            raise NvmlError(f"GPU {name}: {error}") from None
        return handle

    def _is_sliced(self, handle: ctypes.c_void_p) -> bool:
        current, pending = ctypes.c_uint(), ctypes.c_uint()
        try:
            self._call("nvmlDeviceGetMigMode", handle, ctypes.byref(current), ctypes.byref(pending))
        except NvmlError:
            return False  # a GPU that cannot be sliced
        return current.value == 1

    def __len__(self) -> int:
        return len(self._handles)

    def model(self) -> Optional[str]:
        """The name of the first GPU, as the driver has it: pods get GPUs of one kind."""
        name = ctypes.create_string_buffer(NAME_BYTES)
        try:
            self._call("nvmlDeviceGetName", self._handles[0], name, ctypes.c_uint(NAME_BYTES))
        except (IndexError, NvmlError):
            return None
        return name.value.decode(errors="replace") or None

    def energy_joules(self) -> List[float]:
        """Per GPU, since its driver was loaded (the counter is in millijoules; Volta and newer). Raises NvmlError."""
        values = [value / 1000.0 for value in self._read("nvmlDeviceGetTotalEnergyConsumption", ctypes.c_ulonglong)]
        if not all(values):
            raise NvmlError("an energy counter stands at 0: virtual GPUs have one that never moves")
        return values

    def power_watts(self) -> List[float]:
        """Per GPU, the driver's newest average. Raises NvmlError."""
        return [value / 1000.0 for value in self._read("nvmlDeviceGetPowerUsage", ctypes.c_uint)]

    def _read(self, function: str, kind: Any) -> List[int]:
        if self._sliced:
            raise NvmlError("the GPU is divided (MIG) and counts for all its tenants together")
        values = []
        for handle in self._handles:
            value = kind()
            self._call(function, handle, ctypes.byref(value))
            values.append(int(value.value))
        return values
