"""The GPU is found without torch and without TensorRT, and where there is none one line says so."""

from __future__ import annotations

import ctypes
from typing import Any

import pytest

from llmexport.export import device
from llmexport.export.device import Device


class Driver:
    """A CUDA driver that answers with these codes."""

    def __init__(self, devices: int = 1, **codes: int) -> None:
        self.devices, self.codes = devices, codes

    def cuInit(self, flags: int) -> int:
        return self.codes.get("init", 0)

    def cuDeviceGetCount(self, count: Any) -> int:
        count._obj.value = self.devices
        return 0

    def cuDeviceGet(self, found: Any, ordinal: int) -> int:
        found._obj.value = 7
        return 0

    def cuDeviceGetName(self, name: Any, length: int, number: ctypes.c_int) -> int:
        assert (length, number.value) == (256, 7)
        name.value = b"NVIDIA H200"
        return self.codes.get("name", 0)

    def cuDeviceGetAttribute(self, number: Any, attribute: int, which: ctypes.c_int) -> int:
        number._obj.value = {75: 9, 76: 1}[attribute]
        return self.codes.get("attribute", 0)


def test_a_gpu_says_its_name_and_its_compute_capability() -> None:
    found = device.ask(Driver())
    assert found == Device("NVIDIA H200", (9, 1))
    assert found.text == "NVIDIA H200 (compute capability 9.1)"


@pytest.mark.parametrize(
    ("driver", "says"),
    [
        (Driver(init=100), "no GPU is found here, the driver answers with error 100: none is there, or CUDA_VISIBLE"),
        (Driver(init=999), "no GPU is found here, the driver answers with error 999: see `nvidia-smi`"),
        (Driver(devices=0), "no GPU is found here: none is there, or CUDA_VISIBLE_DEVICES hides it"),
        (Driver(name=1), "the GPU does not say what it is, the driver answers with error 1"),
        (Driver(attribute=3), "the GPU does not say what it is, the driver answers with error 3"),
    ],
)
def test_where_there_is_no_gpu_one_line_says_so(driver: Driver, says: str) -> None:
    found = device.ask(driver)
    assert isinstance(found, str)
    assert found.startswith(says)


def test_a_machine_without_a_driver_has_no_gpu(monkeypatch) -> None:
    monkeypatch.setattr(device, "DRIVER", "libno-such-driver.so.1")
    assert device.first() == "no GPU is found here, libno-such-driver.so.1 is not installed"
