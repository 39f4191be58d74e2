"""Small experts in float32, which an operator of ONNX Runtime runs faster: the export lays them out as that wants."""

from __future__ import annotations

import dataclasses

from llmexport.export.assembly import checkpoint_name, part_names
from llmexport.export.checkpoint import Checkpoint
from llmexport.export.packed.experts import with_blocks
from llmexport.export.spec import Arch, Experts, Model, Moe, Plain, Rewritten, Router
from llmexport.graphs import lower_small_experts
from llmexport.graphs.lower_experts import ACTIVATIONS
from llmexport.plugins.dtypes import BY_NAME


def with_small_experts(model: Model, arch: Arch, checkpoint: Checkpoint, target: str, dtype: str) -> Model:
    """The model whose small experts are to be written as lower_small_experts wants them: rows [outputs, inputs], those
    of gate and up in turn. Only those that are stored in float32, in which they are computed, as the operator has one
    type: others would take twice their memory. The same model if it has none."""
    if (target, dtype) != ("onnxruntime", "float32"):
        return model

    def change(moe: Moe, path: str) -> Moe:
        block = moe.experts
        if not (_is_lowered(moe.router) and _fits(block)):
            return moe
        own = next(path for part, path in moe.parts.values() if part is block)
        held = [checkpoint.tensors.get(n) for name in block.sizes for n in _names(block, path + own + name)]
        if any(t is None or t.dtype != BY_NAME[dtype].safetensors for t in held):
            return moe
        storage = Rewritten(1 if block.interleaved else 2, turned=block.transposed)
        changed = dataclasses.replace(block, storage=storage, interleaved=True, transposed=False)
        return dataclasses.replace(moe, experts=changed)

    def _names(block: Experts, path: str) -> tuple[str, ...]:
        whole = checkpoint_name(arch, model, path)
        return (whole,) if whole in checkpoint.tensors else part_names(arch, path, block.experts)

    graphs = tuple(dataclasses.replace(g, assembly=with_blocks(g.assembly, Moe, change)) for g in model.graphs)
    return dataclasses.replace(model, graphs=graphs) if graphs != model.graphs else model


def _is_lowered(router: Router) -> bool:
    """Whether lower_small_experts takes what it says, as far as the model tells."""
    plain = router.groups == 1 and not (router.correction or router.expert_scale)
    return plain and (router.scoring == "softmax_top_k" or (router.scoring == "softmax" and router.renormalise))


def _fits(block: Experts) -> bool:
    """The same of experts; of those that lie [outputs, inputs] in halves half as many numbers, as our own body reads
    them faster. Biases of gate and up one behind the other would have to be written anew as well."""
    faster = not (block.transposed or block.interleaved)
    small = 3 * block.hidden * block.intermediate * (2 if faster else 1) <= lower_small_experts.SMALL
    said = block.activation in ACTIVATIONS and not block.scale_input and block.storage == Plain()
    return small and said and (block.interleaved or not block.bias)
