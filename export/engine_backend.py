"""The flavours of TensorRT that build engines."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from types import MappingProxyType

from llmexport.export.device import Device
from llmexport.export.errors import EngineError


@dataclass(frozen=True)
class Backend:
    """A flavour of TensorRT: its module, the command that installs it, and the GPUs that its plans run on.

    least: the compute capability that its plans need; None where they run on that of the GPU they were built on.
    without: capabilities that it does not run on though they are no less, by their first number, and whose they are.
    """

    module: str
    install: str
    target: str
    least: tuple[int, int] | None
    without: tuple[tuple[int, str], ...] = ()

    def runs_on(self, least: str) -> str:
        """The GPUs that its plans run on, if weights need the capability `least`, as "8.9"."""
        left_out = [f"{first}.x ({whose})" for first, whose in self.without if first >= int(float(least))]
        return self.target.format(least) + (f", but not {', '.join(left_out)}" if left_out else "")

    def remark(self, device: Device) -> str:
        """What is to be known where this GPU is, or nothing."""
        if device.capability[0] not in dict(self.without):
            return ""
        return f"not on the {device.text} that is here: install tensorrt, and take --backend tensorrt"


BACKENDS = MappingProxyType(
    {
        "tensorrt-rtx": Backend(
            "tensorrt_rtx",
            "pip install tensorrt-rtx",
            "NVIDIA GPUs of compute capability {} and later",
            (8, 0),
            # An H200 gave error 6 (TensorRT-RTX 1.7.1): "Supported compute capabilities: 8.0 8.6 8.9 12.0 12.1 >12.0".
            ((9, "H100, H200"), (10, "B200"), (11, "Thor")),
        ),
        "tensorrt": Backend(
            "tensorrt",
            "pip install tensorrt --extra-index-url https://pypi.nvidia.com (it builds only where a GPU is)",
            "the kind of GPU it was built on",
            None,
        ),
    }
)


def check_backend(name: str) -> Backend:
    """The backend of that name. Raises EngineError with the command that installs it, if it is not here."""
    if name not in BACKENDS:
        raise EngineError(f"backend is {name!r}: choose one of {', '.join(BACKENDS)}")
    chosen = BACKENDS[name]
    if importlib.util.find_spec(chosen.module) is None:
        raise EngineError(f"{name} is not installed: {chosen.install}")
    return chosen
