"""Multi-head latent attention, as graphs have it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_graphsurgeon as gs

from llmexport.graphs.causal import is_causal
from llmexport.graphs.fusion import Refusal, float_type, is_output, produced_by, producer, sole_consumer
from llmexport.graphs.grouped import TYPES

ALONE = {"is_causal": 0, "qk_matmul_output_mode": 0}  # attributes, and what they are where a mask hides all


@dataclass(frozen=True)
class Form:
    """Own [B, H, T, K] and turned [B, H, T, R] parts of queries, the matrices that make keys [H, K, L] and values
    [H, V, L], latents [B, 1, N, L], the keys that heads share [B, 1, N, R], the mask, and the nodes behind the
    Attention, of which the last makes [B, T, H, V]. `length`: what slots are written from; None where there are none.
    """

    own: gs.Tensor
    turned: gs.Tensor
    key_matrices: gs.Tensor
    value_matrices: gs.Tensor
    latent: gs.Tensor
    shared: gs.Tensor
    mask: gs.Tensor
    behind: list[gs.Node]
    length: gs.Tensor | None

    @property
    def sizes(self) -> tuple[int, int, int, int, int]:
        """H, K, V, L and R."""
        heads, key, latent = self.key_matrices.shape
        return heads, key, self.value_matrices.shape[1], latent, self.shared.shape[3]


def form_of(graph: gs.Graph, node: gs.Node) -> Form:
    """That of an Attention whose keys are its values. Raises Refusal on other forms."""
    if len(node.inputs) != 4 or len(node.outputs) > 1 or any(node.attrs.get(n, v) != v for n, v in ALONE.items()):
        raise Refusal("it has not queries, keys, values and a mask alone")
    query, both, _, mask = node.inputs
    latent, shared = _beside(both, why := "its keys are not latents and what heads share")
    if latent.shape[1] != 1 or shared.shape[1] != 1:
        raise Refusal(why)
    absorbed, turned = _beside(query, why := "its queries are not products with matrices and what is turned")
    product = produced_by(absorbed, "MatMul")
    if product is None or len(product.inputs[0].shape or ()) != 4:
        raise Refusal(why)
    own, key_matrices = product.inputs
    behind = _behind(graph, node, latent.shape[3])
    value_matrices = behind[2].inputs[0]
    for matrices in (key_matrices, value_matrices):
        # A weight is bound by another name, which a branch would not know.
        if producer(matrices) is None or [type(n) for n in matrices.shape or ()] != [int] * 3:
            raise Refusal("its matrices are not [H, D, L] that nodes make")
    length = _length(latent, shared)
    if None in (mask.shape or [None]) or list(mask.shape)[1:] != [1, own.shape[2], latent.shape[2]]:
        raise Refusal("its mask is not [B, 1, T, N]")
    if length is not None and not is_causal(mask, length, latent.shape[2]):
        raise Refusal("its mask may show keys that are written behind the query's")
    if (kind := float_type(own)) not in TYPES:
        raise Refusal(f"it is of {kind or 'no float type'}, not of {' or '.join(TYPES)}")
    return Form(own, turned, key_matrices, value_matrices, latent, shared, mask, behind, length)


def _beside(value: gs.Tensor, why: str) -> tuple[gs.Tensor, gs.Tensor]:
    """The two [B, heads, tokens, D] of which one lies beside the other."""
    node = produced_by(value, "Concat")
    if node is None or len(node.inputs) != 2 or node.attrs.get("axis") not in (3, -1):
        raise Refusal(why)
    if any(len(v.shape or ()) != 4 or not isinstance(v.shape[3], int) for v in node.inputs):
        raise Refusal(why)
    first, second = node.inputs
    return first, second


def _behind(graph: gs.Graph, attention: gs.Node, latent: int) -> list[gs.Node]:
    """Those that make [B, T, H, V] of what is attended: Slice, Transpose, MatMul and Transpose."""
    behind = [attention]
    for op in ("Slice", "Transpose", "MatMul", "Transpose"):
        made = behind[-1].outputs[0]
        if is_output(graph, made):
            raise Refusal("what is attended is a graph output")
        node = sole_consumer(made, "what is attended")
        if node.op != op or node.inputs[op == "MatMul"] is not made:
            raise Refusal("what is attended is not multiplied with matrices alone")
        behind.append(node)
    kept = [list(np.ravel(v.values)) if isinstance(v, gs.Constant) else None for v in behind[1].inputs[1:]]
    if kept[:3] != [[0], [latent], [3]] or kept[3:] not in ([], [[1]]):
        raise Refusal("of what is attended not the latents are kept")
    if [list(behind[i].attrs.get("perm", ())) for i in (2, 4)] != [[0, 1, 3, 2], [0, 3, 1, 2]]:
        raise Refusal("what is attended is not turned back")
    return behind[1:]


def _length(latent: gs.Tensor, shared: gs.Tensor) -> gs.Tensor | None:
    """What slots are written from; None where keys are not in slots."""
    one, other = (produced_by(v, "TensorScatter") for v in (latent, shared))
    if one is None and other is None:
        return None
    if one is None or other is None or one.inputs[2] is not other.inputs[2]:
        raise Refusal("its latents and shared keys are not written from one length on")
    if any(w.attrs.get("mode", "linear") != "linear" or w.attrs.get("axis", -2) not in (-2, 2) for w in (one, other)):
        raise Refusal("its latents are not slots that this step is written into")
    return one.inputs[2]
