"""The tower of Gemma 3 (transformers modeling_gemma3.py): SigLIP (modeling_siglip.py), whole pictures of one size with
learned positions and LayerNorm; the mean of neighbours, a norm and a matrix make features of its patches."""

from __future__ import annotations

import math
from typing import Any

from llmexport.export.archs.towers.gemma3_files import BESIDE, WORDS
from llmexport.export.config import Config
from llmexport.export.decoder import ACTIVATIONS
from llmexport.export.errors import ExportError
from llmexport.export.spec import (
    TILES,
    Attention,
    Graph,
    Layer,
    Mlp,
    Norm,
    PooledProjector,
    Splice,
    Sublayer,
    TileEmbedding,
    Tower,
)
from llmexport.export.wiring import Wiring

# Of the published checkpoints; later releases save other starts of these names.
PUBLISHED, PROJECTOR = "vision_tower.vision_model.", "multi_modal_projector."
LAYER = PUBLISHED + "encoder.layers.{i}."


def build(config: Config, beside: Config, width: int) -> tuple[Graph, Splice]:
    config.expect("model_type", "siglip_vision_model")
    # It has nothing to do with the features.
    config.get("vision_use_head", None)
    hidden, heads = config.length("hidden_size", 768), config.count("num_attention_heads", 12)
    if hidden % heads:
        raise ExportError(f"config.json: vision_config has hidden_size {hidden}, no multiple of {heads} heads")
    image, patch = config.side("image_size", 224), config.side("patch_size", 16)
    if image % patch:
        raise ExportError(f"config.json: vision_config has image_size {image}, no multiple of patch_size {patch}")
    side, tokens = image // patch, beside.length("mm_tokens_per_image", 256)
    across = math.isqrt(tokens)
    if across**2 != tokens or side % across:
        raise ExportError(
            f"config.json: mm_tokens_per_image is {tokens}, expected the square of a number that divides {side} patches"
        )
    epsilon, axes = config.number("layer_norm_eps", 1e-6), (TILES, side**2)
    norm = Norm(hidden, epsilon, statistics="layer", bias=True, axes=axes)
    fields: dict[str, Any] = {"qkv_bias": True, "out_bias": True, "rotated": 0, "cached": False, "masked": False}
    attention = Attention(hidden, heads, heads, hidden // heads, axes=axes, **fields)
    activation = config.choice("hidden_act", ACTIVATIONS, "gelu_pytorch_tanh")
    mlp = Mlp(hidden, config.length("intermediate_size", 3072), activation, bias=True, gated=False, axes=axes)
    layer = Layer((Sublayer("self_attn", attention, norm), Sublayer("mlp", mlp, norm)))
    embedding = TileEmbedding(config.count("num_channels", 3), side, patch, hidden, kernel=True)
    pooled = Norm(hidden, epsilon, 1.0, "after_weight", axes=(TILES, tokens))
    projector = PooledProjector(side, side // across, pooled, width)

    wiring = Wiring("vision")
    wiring.take(*embedding.inputs)
    (seen,) = wiring.place("tile_embedding", embedding, ["seen.0"], path="vision.tile_embedding.")
    for i in range(config.count("num_hidden_layers", 12)):
        place = f"layers.{i}"
        (seen,) = wiring.place(place, layer, [f"seen.{i + 1}"], path=f"vision.{place}.", hidden=seen)
    (seen,) = wiring.place("output_norm", norm, ["seen"], path="vision.output_norm.", hidden=seen)
    wiring.place("projector", projector, path="vision.projector.", hidden=seen)
    wiring.give(*projector.outputs)
    token = beside.integer("image_token_index", 262144, least=0)
    return wiring.done(), Splice((token,), width, numbered=True)


TOWER = Tower(
    build=build,
    names={
        "vision.tile_embedding.": PUBLISHED + "embeddings.patch_embedding.",
        "vision.tile_embedding.positions": PUBLISHED + "embeddings.position_embedding.weight",
        "vision.layers.{i}.": LAYER,
        "vision.layers.{i}.self_attn.o_proj.": LAYER + "self_attn.out_proj.",
        "vision.layers.{i}.self_attn_input_norm.": LAYER + "layer_norm1.",
        "vision.layers.{i}.mlp.up_proj.": LAYER + "mlp.fc1.",
        "vision.layers.{i}.mlp.down_proj.": LAYER + "mlp.fc2.",
        "vision.layers.{i}.mlp_input_norm.": LAYER + "layer_norm2.",
        "vision.output_norm.": PUBLISHED + "post_layernorm.",
        "vision.projector.weight": PROJECTOR + "mm_input_projection_weight",
        "vision.projector.norm.": PROJECTOR + "mm_soft_emb_norm.",
    },
    other_names=(
        {PUBLISHED: "vision_tower."},
        {PUBLISHED: f"model.{PUBLISHED}", PROJECTOR: f"model.{PROJECTOR}"},
        {PUBLISHED: "model.vision_tower.", PROJECTOR: f"model.{PROJECTOR}"},
    ),
    tiny={
        "vision_config": {
            "model_type": "siglip_vision_model",
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": 24,
            "patch_size": 4,
            "vision_use_head": False,
        },
        "mm_tokens_per_image": 9,
        "image_token_index": 250,
        "boi_token_index": 251,
        "eoi_token_index": 252,
    },
    words=WORDS,
    beside=BESIDE,
)
