"""The flavours of TensorRT that build engines."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from types import MappingProxyType

from llmexport.export.errors import EngineError


@dataclass(frozen=True)
class Backend:
    """A flavour of TensorRT: its module, the command that installs it, and the GPUs that its plans run on.

    least: the compute capability that its plans need; None where they run on that of the GPU they were built on.
    """

    module: str
    install: str
    target: str
    least: tuple[int, int] | None


BACKENDS = MappingProxyType(
    {
        "tensorrt-rtx": Backend(
            "tensorrt_rtx",
            "pip install tensorrt-rtx",
            "NVIDIA GPUs of compute capability {} and later",
            (8, 0),
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
