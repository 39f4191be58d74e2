"""What differs between TensorRT 10, TensorRT 11 and TensorRT-RTX, for who runs an engine: asked of the module, once."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llmexport.export.engine_record import Plan
from llmexport.export.errors import EngineError
from llmexport.plugins.dtypes import BY_TENSORRT

# Before Polygraphy is imported, which asks it then.
USE_RTX = "POLYGRAPHY_USE_TENSORRT_RTX"
# Of TensorRT-RTX's diagnostics, by name, what there is to do.
CURES = {
    "VERSION_MISMATCH": "install the version that built it",
    "UNSUPPORTED_CC": "it does not run on this GPU, build it here with --backend tensorrt",
    "OLD_CUDA_DRIVER": "update the driver",
    "OLD_CUDA_RUNTIME": "update the CUDA runtime",
    "INSUFFICIENT_GPU_MEMORY": "free memory of the GPU",
    "MALFORMED_ENGINE": "build it again",
}


def environment(module: str, others: Mapping[str, str]) -> dict[str, str]:
    """The environment in which Polygraphy takes this TensorRT module, and no other."""
    return {**others, USE_RTX: "1" if module == "tensorrt_rtx" else "0"}


def refusal(trt: Any, runtime: Any, plan: bytes) -> str:
    """What TensorRT says against a plan before it is deserialised, or nothing; only TensorRT-RTX can be asked."""
    if not hasattr(trt.Runtime, "get_engine_validity"):
        return ""
    valid, found = runtime.get_engine_validity(plan)
    if valid != trt.EngineValidity.INVALID:
        return ""
    flags = trt.EngineInvalidityDiagnostics
    names = [n for n in dir(flags) if n.isupper() and int(found) & int(getattr(flags, n))]
    return "; ".join(f"{n}: {CURES[n]}" if n in CURES else n for n in names) or "it gives no reason"


def context(trt: Any, engine: Any) -> Any:
    """An execution context, whose kernels depend on nothing but the plan and the GPU; None if TensorRT makes none.

    TensorRT-RTX compiles kernels for the shapes that it sees, in the background, and takes them when they are ready:
    the numbers of a step would depend on how long the ones before it took.
    """
    if hasattr(trt.IRuntimeConfig, "dynamic_shapes_kernel_specialization_strategy"):
        config = engine.create_runtime_config()
        config.dynamic_shapes_kernel_specialization_strategy = trt.DynamicShapesKernelSpecializationStrategy.NONE
        made = engine.create_execution_context(config)
    else:
        made = engine.create_execution_context()
    if made is not None:
        # Our plans hold details of each kernel, and to say them to NVTX at every step takes time.
        made.nvtx_verbosity = trt.ProfilingVerbosity.LAYER_NAMES_ONLY
    return made


def check_io(trt: Any, engine: Any, plan: Plan) -> None:
    """Raise EngineError unless the engine has the inputs and outputs that were recorded, in their types.

    Positions and masks are int64, which TensorRT 8 and 9 would have narrowed.
    """
    names = [engine.get_tensor_name(i) for i in range(engine.num_io_tensors)]
    for mode, ports in ((trt.TensorIOMode.INPUT, plan.inputs), (trt.TensorIOMode.OUTPUT, plan.outputs)):
        found = {n: engine.get_tensor_dtype(n).name for n in names if engine.get_tensor_mode(n) == mode}
        read = {n: BY_TENSORRT[kind].name if kind in BY_TENSORRT else kind for n, kind in found.items()}
        said = {p.name: p.dtype for p in ports}
        if mode == trt.TensorIOMode.INPUT:
            said |= {name: binding.dtype for name, binding in plan.bindings.items()}
        if odd := sorted(n for n in read.keys() | said.keys() if read.get(n) != said.get(n)):
            one = odd[0]
            raise EngineError(f"{plan.file} has {one} as {read.get(one)}, recorded is {said.get(one)}: build it again")
