"""QkNormRopeWrite: QkNormRope, and a static cache with its keys and values in their slots."""

import torch
from torch import Tensor

from llmexport.plugins.qk_norm_rope import qk_norm_rope
from llmexport.plugins.qk_norm_rope_write.body import body
from llmexport.plugins.slots import written
from llmexport.plugins.spec import op


def fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    past_key: Tensor,
    past_value: Tensor,
    write_indices: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    interleaved: bool,
    epsilon: float,
    weight_offset: float,
    round_before_weight: bool,
    norm_first: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The reference looks at the slots."""
    batch, tokens, heads, _ = q.shape
    query = q.new_empty((batch, heads, tokens, k.shape[-1]))
    return query, torch.empty_like(past_key), torch.empty_like(past_value)


@op(
    "QkNormRopeWrite",
    version=1,
    dims={
        "q": "B T H Q",
        "k": "B T G D",
        "v": "B T G D",
        "cos": "B T R",
        "sin": "B T R",
        "past_key": "B G S D",
        "past_value": "B G S D",
        "write_indices": "B",
        "q_weight": "D",
        "k_weight": "D",
    },
    outputs={"query": "B H T D", "key": "B G S D", "value": "B G S D"},
    static=("Q", "D", "R"),
    types={"write_indices": "int32"},
    aliases={"key": "past_key", "value": "past_value"},
    joins=("q", "k", "v"),
    body=body,
    fake=fake,
)
def qk_norm_rope_write(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    past_key: Tensor,
    past_value: Tensor,
    write_indices: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    interleaved: bool,
    epsilon: float,
    weight_offset: float,
    round_before_weight: bool,
    norm_first: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """QkNormRope of the same tensors, whose key and value are written into a cache as TensorScatter writes them.

    past_key, past_value [B, G, S, D] are the cache before; row b of the step goes into slots write_indices[b] on,
    int32 [B]; key and value are the cache after. Raises ValueError if one of the weights is missing, or if a slot is
    none of the S; a plugin leaves such a token out.
    """
    attributes = (interleaved, epsilon, weight_offset, round_before_weight, norm_first)
    query, key, value = qk_norm_rope.reference(q, k, v, cos, sin, q_weight, k_weight, *attributes)
    return query, written(past_key, key, write_indices), written(past_value, value, write_indices)
