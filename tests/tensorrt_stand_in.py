"""Stand-ins for the TensorRT modules, which have no name that the recorded API of theirs lacks, and run toy_model.py.

`validate/tensorrt_apis.json` lists the public names of TensorRT 10, TensorRT 11 and TensorRT-RTX that matter to who
runs an engine, as dir() gives them of NVIDIA's bindings.
"""

from __future__ import annotations

import json
import types
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import toy_model

from llmexport.export.spec import Port
from llmexport.plugins.dtypes import BY_NAME

APIS: list[dict[str, Any]] = json.loads((Path(__file__).parent / "validate/tensorrt_apis.json").read_text())
INVALID, VALID = "INVALID", "VALID"


def named(api: dict[str, Any], cls: str, **attributes: Any) -> Any:
    """An object of a class with these attributes, which the API must have."""
    assert attributes.keys() <= {*api["classes"][cls]}, f"{cls} of {api['module']} {api['version']}"
    return type(cls, (), attributes)()


def enum(api: dict[str, Any], cls: str) -> Any:
    """Its names, each standing for itself."""
    return types.SimpleNamespace(**{n: n for n in api["classes"][cls] if n.isupper()})


@dataclass(frozen=True, eq=False)
class Placed:
    """A weight where the GPU would have it."""

    array: np.ndarray


class Context:
    """An execution context: what is done with it, of which there is one thing."""

    def __init__(self, done: list[Any]) -> None:
        super().__setattr__("done", done)

    def __setattr__(self, name: str, value: Any) -> None:
        assert name == "nvtx_verbosity", f"{name} is set to {value}"
        self.done.append(("nvtx", value))


class Stand:
    """A TensorRT module as one of the APIs has it, and what was done with it.

    `validity` is what TensorRT-RTX says of a plan, with the bits of its diagnostics. `deserialises` and `contexts` say
    whether it makes an engine, and a context of it.
    """

    def __init__(self, api: dict[str, Any], inputs: tuple[Port, ...], outputs: tuple[Port, ...], dtype: str) -> None:
        self.api, self.ports, self.dtype = api, (inputs, outputs), dtype
        self.done: list[Any] = []
        self.validity: tuple[str, int] = (VALID, 0)
        self.deserialises = self.contexts = True
        self.kinds = {p.name: BY_NAME[p.dtype].tensorrt for p in (*inputs, *outputs)}
        names = {c: getattr(self, f"_{c.lower()}", lambda c=c: enum(api, c))() for c in api["classes"]}
        self.trt: Any = types.SimpleNamespace(__name__=api["module"], __version__=api["version"], **names)

    def _logger(self) -> Any:
        def make(severity: str) -> str:
            return f"a logger of {severity}"

        make.WARNING = "WARNING"  # type: ignore[attr-defined]
        return make

    def _runtime(self) -> Any:
        stand, asked = self, "get_engine_validity" in self.api["classes"]["Runtime"]

        class Runtime:
            def __init__(self, logger: str) -> None:
                assert logger == "a logger of WARNING"

            def deserialize_cuda_engine(self, data: bytes) -> Any:
                stand.done.append(("deserialise", len(data)))
                return stand.engine() if stand.deserialises else None

            def __setattr__(self, name: str, value: Any) -> None:
                raise AssertionError(f"{name} is set to {value}")

        if asked:
            Runtime.get_engine_validity = lambda self, data: stand.validity  # type: ignore[attr-defined]
        return Runtime

    def _iruntimeconfig(self) -> Any:
        return type("IRuntimeConfig", (), dict.fromkeys(self.api["classes"]["IRuntimeConfig"]))

    def _engineinvaliditydiagnostics(self) -> Any:
        names = [n for n in self.api["classes"]["EngineInvalidityDiagnostics"] if n.isupper()]
        return types.SimpleNamespace(**{n: 1 << i for i, n in enumerate(names)})

    def engine(self) -> Any:
        _, outputs = self.ports
        names, ends = [*self.kinds], {p.name for p in outputs}

        def create(engine: Any, config: Any = None) -> Any:
            strategy = getattr(config, "dynamic_shapes_kernel_specialization_strategy", None)
            self.done.append(("context", strategy))
            return Context(self.done) if self.contexts else None

        return named(
            self.api,
            "ICudaEngine",
            num_io_tensors=len(names),
            get_tensor_name=lambda engine, i: names[i],
            get_tensor_mode=lambda engine, n: "OUTPUT" if n in ends else "INPUT",
            get_tensor_dtype=lambda engine, n: types.SimpleNamespace(name=self.kinds[n]),
            create_runtime_config=lambda engine: types.SimpleNamespace(),
            create_execution_context=create,
            device_memory_size_v2=3_000_000_000,
        )

    def place(self, array: np.ndarray) -> Placed:
        self.done.append(("place", array.shape))
        return Placed(array)

    def runner(self, context: Context) -> Any:
        """In place of Polygraphy's TrtRunner."""
        assert isinstance(context, Context)

        def infer(feed: Any, check_inputs: bool, return_raw_buffers: bool) -> Any:
            assert (check_inputs, return_raw_buffers) == (False, True)
            self.placed = {n: a for n, a in feed.items() if isinstance(a, Placed)}
            made = toy_model.run({n: a for n, a in feed.items() if n not in self.placed}, self.dtype)
            return {
                n: types.SimpleNamespace(array=np.frombuffer(a.tobytes(), np.uint8), shape=a.shape)
                for n, a in made.items()
            }

        return types.SimpleNamespace(activate=lambda: None, infer=infer, last_inference_time=lambda: 0.25)
