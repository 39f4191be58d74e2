"""The GPU here, as the driver says it: no torch, no TensorRT, and no context is made on it."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

DRIVER = "libcuda.so.1"
# Numbers of cuda.h: CUdevice_attribute.
CAPABILITY_MAJOR, CAPABILITY_MINOR = 75, 76
NO_DEVICE = 100


@dataclass(frozen=True)
class Device:
    """A GPU: what it is called, and its compute capability, as (9, 0)."""

    name: str
    capability: tuple[int, int]

    @property
    def text(self) -> str:
        return f"{self.name} (compute capability {self.capability[0]}.{self.capability[1]})"


def first() -> Device | str:
    """The first GPU that CUDA shows to this process, or in a few words why there is none."""
    try:
        driver = ctypes.CDLL(DRIVER)
    except OSError:
        return f"no GPU is found here, {DRIVER} is not installed"
    return ask(driver)


def ask(driver: ctypes.CDLL) -> Device | str:
    """The same of a driver that has been loaded."""
    count, device = ctypes.c_int(), ctypes.c_int()
    if code := driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count)):
        what = "none is there, or CUDA_VISIBLE_DEVICES hides it" if code == NO_DEVICE else "see `nvidia-smi`"
        return f"no GPU is found here, the driver answers with error {code}: {what}"
    if not count.value:
        return "no GPU is found here: none is there, or CUDA_VISIBLE_DEVICES hides it"
    name, numbers = ctypes.create_string_buffer(256), (ctypes.c_int(), ctypes.c_int())
    asked = driver.cuDeviceGet(ctypes.byref(device), 0) or driver.cuDeviceGetName(name, len(name), device)
    for number, attribute in zip(numbers, (CAPABILITY_MAJOR, CAPABILITY_MINOR), strict=True):
        asked = asked or driver.cuDeviceGetAttribute(ctypes.byref(number), attribute, device)
    if asked:
        return f"the GPU does not say what it is, the driver answers with error {asked}: see `nvidia-smi`"
    return Device(name.value.decode(errors="replace"), (numbers[0].value, numbers[1].value))
