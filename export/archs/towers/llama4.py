"""The tower of Llama 4 (transformers modeling_llama4.py): tiles with a class token and learned positions, RoPE in two
dimensions, LayerNorm, a pixel shuffle."""

from __future__ import annotations

from llmexport.export.archs.towers.llama4_files import BESIDE, WORDS
from llmexport.export.config import Config
from llmexport.export.errors import ExportError
from llmexport.export.spec import (
    TILES,
    Attention,
    Graph,
    Layer,
    Mlp,
    Norm,
    PixelShuffle,
    Projector,
    Splice,
    Sublayer,
    TileEmbedding,
    TileRotary,
    Tower,
)
from llmexport.export.wiring import Wiring

EPSILON = 1e-5  # of all its norms, whatever norm_eps says
LAYER = "vision_model.model.layers.{i}."


def build(config: Config, beside: Config, width: int) -> tuple[Graph, Splice]:
    hidden, heads = config.length("hidden_size", 768), config.count("num_attention_heads", 16)
    if hidden % heads:
        raise ExportError(f"config.json: vision_config has hidden_size {hidden}, no multiple of {heads} heads")
    image, patch = config.side("image_size", 448), config.side("patch_size", 14)
    if image % patch:
        raise ExportError(f"config.json: vision_config has image_size {image}, no multiple of patch_size {patch}")
    side, size, channels = image // patch, hidden // heads, config.count("num_channels", 3)
    ratio = config.number("pixel_shuffle_ratio", 0.5)
    merge = round(1 / ratio)
    if merge * ratio != 1:
        raise ExportError(f"config.json: vision_config has pixel_shuffle_ratio {ratio}, expected 1 through a number")
    axes = (TILES, side**2 + 1)
    norm = Norm(hidden, EPSILON, statistics="layer", bias=True, axes=axes)
    config.get("norm_eps", None)
    attention = Attention(
        *(hidden, heads, heads, size),
        qkv_bias=True,
        out_bias=True,
        interleaved=True,
        cached=False,
        masked=False,
        axes=axes,
    )
    config.expect("hidden_act", "gelu")
    intermediate = config.length("intermediate_size", 5632)
    if intermediate != merge**2 * hidden:
        # It is the width of the MLP of a layer, and of what the pixel shuffle makes.
        wanted = f"{merge}**2 * hidden_size {hidden}"
        raise ExportError(f"config.json: vision_config has intermediate_size {intermediate}, expected {wanted}")
    mlp = Mlp(hidden, intermediate, "gelu_erf", bias=True, gated=False, axes=axes)
    layer = Layer((Sublayer("self_attn", attention, norm), Sublayer("mlp", mlp, norm)))
    rotary = TileRotary(channels, side, patch, size, config.rotary(size, types={"default": "default"}).theta)
    embedding = TileEmbedding(channels, side, patch, hidden)
    out = config.length("projector_output_dim", 4096)
    said = {"projector_input_dim": 4096, "vision_output_dim": 7680}
    if other := [f"{k} {n}" for k, absent in said.items() if (n := config.length(k, absent)) != out]:
        raise ExportError(f"config.json: vision_config has projector_output_dim {out}, but {' and '.join(other)}")
    shuffle = PixelShuffle(side, merge, hidden, out)
    projector = Projector(shuffle.tokens, out, width)
    config.expect("multi_modal_projector_bias", False)
    config.expect("vision_feature_select_strategy", "default")
    config.expect("vision_feature_layer", -1)
    config.get("projector_dropout", None)

    wiring = Wiring("vision")
    wiring.take(*embedding.inputs)
    (seen,) = wiring.place("tile_embedding", embedding, path="vision.tile_embedding.")
    (seen,) = wiring.place("input_norm", norm, ["seen.0"], path="vision.input_norm.", hidden=seen)
    wiring.share((rotary,))
    for i in range(config.count("num_hidden_layers", 34)):
        place = f"layers.{i}"
        (seen,) = wiring.place(place, layer, [f"seen.{i + 1}"], context=(rotary,), path=f"vision.{place}.", hidden=seen)
    (seen,) = wiring.place("output_norm", norm, ["seen"], path="vision.output_norm.", hidden=seen)
    (seen,) = wiring.place("pixel_shuffle", shuffle, path="vision.pixel_shuffle.", hidden=seen)
    wiring.place("projector", projector, path="vision.projector.", hidden=seen)
    wiring.give(*projector.outputs)
    return wiring.done(), Splice((beside.integer("image_token_index", 200092, least=0),), width)


TOWER = Tower(
    build=build,
    names={
        "vision.tile_embedding.weight": "vision_model.patch_embedding.linear.weight",
        "vision.tile_embedding.class_token": "vision_model.class_embedding",
        "vision.tile_embedding.positions": "vision_model.positional_embedding_vlm",
        "vision.input_norm.": "vision_model.layernorm_pre.",
        "vision.layers.{i}.": LAYER,
        "vision.layers.{i}.self_attn_input_norm.": LAYER + "input_layernorm.",
        "vision.layers.{i}.mlp.up_proj.": LAYER + "mlp.fc1.",
        "vision.layers.{i}.mlp.down_proj.": LAYER + "mlp.fc2.",
        "vision.layers.{i}.mlp_input_norm.": LAYER + "post_attention_layernorm.",
        "vision.output_norm.": "vision_model.layernorm_post.",
        "vision.pixel_shuffle.up_proj.": "vision_model.vision_adapter.mlp.fc1.",
        "vision.pixel_shuffle.down_proj.": "vision_model.vision_adapter.mlp.fc2.",
        "vision.projector.projection.": "multi_modal_projector.linear_1.",
    },
    tiny={
        "vision_config": {
            "hidden_size": 32,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": 24,
            "patch_size": 4,
            "vision_output_dim": 48,
            "projector_input_dim": 48,
            "projector_output_dim": 48,
        },
        "image_token_index": 250,
        "boi_token_index": 251,
        "eoi_token_index": 252,
    },
    words=WORDS,
    beside=BESIDE,
)
