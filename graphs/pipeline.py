"""The passes, in the order in which they run. The order lives here and nowhere else."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping

import onnx
import onnx_graphsurgeon as gs
from onnx_graphsurgeon.logger import G_LOGGER

from llmexport.graphs.fuse_add_rms_norm import fuse_add_rms_norm
from llmexport.graphs.fuse_cache_write import fuse_cache_write
from llmexport.graphs.fuse_gated_act import fuse_gated_act
from llmexport.graphs.fuse_gated_delta_net import fuse_gated_delta_net
from llmexport.graphs.fuse_qk_norm_rope import fuse_qk_norm_rope
from llmexport.graphs.fusion import Fused
from llmexport.graphs.lower_add_rms_norm import lower_add_rms_norm
from llmexport.graphs.lower_attention import lower_attention
from llmexport.graphs.lower_experts import lower_experts
from llmexport.graphs.lower_latent_attention import lower_latent_attention
from llmexport.graphs.lower_sink_attention import lower_sink_attention
from llmexport.graphs.lower_small_experts import lower_small_experts
from llmexport.graphs.lower_static_attention import lower_static_attention
from llmexport.graphs.lower_whole_attention import lower_whole_attention

Pass = Callable[[gs.Graph], Fused]
PIPELINE: tuple[Pass, ...] = (fuse_add_rms_norm, fuse_gated_act)
# By target, those that come after.
LOWERING: Mapping[str, tuple[Pass, ...]] = {
    "onnxruntime": (
        lower_latent_attention,
        lower_static_attention,
        lower_attention,
        lower_sink_attention,
        lower_whole_attention,
        lower_experts,
        lower_small_experts,
        lower_add_rms_norm,
    ),
    "tensorrt": (fuse_qk_norm_rope, fuse_gated_delta_net),
}
# Those of the portable target where a cache is written in place, as engines serve with.
IN_PLACE: tuple[Pass, ...] = (fuse_qk_norm_rope, fuse_gated_delta_net)
# By the op that they make, those that an engine wants of any graph.
OF_ENGINES: Mapping[str, Pass] = {"QkNormRope": fuse_qk_norm_rope, "GatedDeltaNet": fuse_gated_delta_net}
# After those, where an op of ours writes the cache and not a layer of TensorRT's own.
WRITES: tuple[Pass, ...] = (fuse_cache_write,)


def passes(target: str, in_place: bool, writes: bool = False) -> tuple[Pass, ...]:
    """in_place: whether the graph writes into a cache. writes: whether ops of ours do so, where they can."""
    return (*PIPELINE, *LOWERING.get(target, IN_PLACE if in_place else ()), *(WRITES if writes and in_place else ()))


def run(
    model: onnx.ModelProto, target: str = "portable", writes: bool = False
) -> tuple[onnx.ModelProto, dict[str, Fused]]:
    """The model after all passes for a target, and what each did, by the pass's name. writes: as of `passes`.

    Function bodies do not survive the round trip: attach them afterwards.
    """
    graph = _imported(model)
    in_place = any(n.op == "TensorScatter" for n in graph.nodes)
    results = {step.__name__: step(graph) for step in passes(target, in_place, writes)}
    return _exported(graph, model), results


def run_for_engine(model: onnx.ModelProto, served: Collection[str]) -> onnx.ModelProto:
    """The model, whose ops in `served` are nodes by their names, after those passes of engines that make more of these.

    Function bodies do not survive, as above.
    """
    graph = _imported(model)
    for op, step in OF_ENGINES.items():
        if op in served:
            step(graph)
    return _exported(graph, model)


def _imported(model: onnx.ModelProto) -> gs.Graph:
    # GraphSurgeon warns of every bfloat16, which it carries through all the same, and of a missing package for colours.
    G_LOGGER.severity = G_LOGGER.ERROR
    return gs.import_onnx(model)


def _exported(graph: gs.Graph, model: onnx.ModelProto) -> onnx.ModelProto:
    made: onnx.ModelProto = gs.export_onnx(graph, ir_version=model.ir_version, producer_name=model.producer_name)
    return made
