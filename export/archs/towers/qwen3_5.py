"""The tower of Qwen3.5 (transformers modeling_qwen3_5.py, the same in modeling_qwen3_5_moe.py): packed patches of
pictures and frames, positions resampled from a table, RoPE in two dimensions, LayerNorm."""

from __future__ import annotations

import math

from llmexport.export.config import Config
from llmexport.export.decoder import ACTIVATIONS
from llmexport.export.errors import ExportError
from llmexport.export.spec import (
    Attention,
    Graph,
    Layer,
    Mlp,
    Norm,
    PatchEmbedding,
    PatchMerger,
    PatchPlaces,
    PatchPositions,
    PatchRotary,
    SegmentMask,
    Splice,
    Sublayer,
    Tower,
    patch_axis,
)
from llmexport.export.wiring import Wiring

VISUAL = "model.visual."
BLOCK = VISUAL + "blocks.{i}."

# Of the tiny one: of how many colours a picture is at least and at most, in patches of the tower's size.
PROCESSOR = {
    "processor_class": "Qwen3VLProcessor",
    "size": {"shortest_edge": 64, "longest_edge": 2048},
    "patch_size": 4,
    "merge_size": 2,
    "temporal_patch_size": 2,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
}
TEMPLATE = """\
{%- for message in messages %}<|im_start|>{{ message.role + '\\n' }}
{%- if message.content is string %}{{ message.content }}
{%- else %}
{%- for part in message.content %}
{%- if part.type == 'text' %}{{ part.text }}
{%- else %}<|vision_start|>{{ '<|' + part.type + '_pad|>' }}<|vision_end|>
{%- endif %}
{%- endfor %}
{%- endif %}<|im_end|>{{ '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}<|im_start|>assistant{{ '\\n' }}{%- endif %}"""


def build(config: Config, beside: Config, width: int) -> tuple[Graph, Splice]:
    hidden, heads = config.length("hidden_size", 1152), config.count("num_heads", 16)
    if hidden % heads:
        raise ExportError(f"config.json: vision_config has hidden_size {hidden}, no multiple of {heads} heads")
    merge, out = config.count("spatial_merge_size", 2), config.length("out_hidden_size", 3584)
    if out != width:
        raise ExportError(f"config.json: vision_config has out_hidden_size {out}, the text model hidden_size {width}")
    axis, size = patch_axis(merge**2), hidden // heads
    positions = config.length("num_position_embeddings", 2304)
    side = math.isqrt(positions)
    if side**2 != positions:
        raise ExportError(f"config.json: vision_config has num_position_embeddings {positions}, expected a square")
    channels, frames = config.count("in_channels", 3), config.side("temporal_patch_size", 2)
    embedding = PatchEmbedding(channels, frames, config.side("patch_size", 16), hidden, axis)
    config.expect("deepstack_visual_indexes", [], None)
    norm = Norm(hidden, 1e-6, statistics="layer", bias=True, axes=(1, axis))
    attention = Attention(
        hidden, heads, heads, size, qkv_bias=True, out_bias=True, fused=True, cached=False, axes=(1, axis)
    )
    activation = config.choice("hidden_act", ACTIVATIONS, "gelu_pytorch_tanh")
    mlp = Mlp(hidden, config.length("intermediate_size", 4304), activation, bias=True, gated=False, axes=(1, axis))
    layer = Layer((Sublayer("self_attn", attention, norm), Sublayer("mlp", mlp, norm)))
    theta = config.rotary(size, types={"axial": "default", "default": "default"}).theta
    rotary, mask = PatchRotary(size, theta, axis), SegmentMask(axis)
    places = PatchPlaces(merge, math.prod((channels, *embedding.kernel)), axis)

    wiring = Wiring("vision")
    wiring.take(*places.inputs)
    wiring.place("patch_places", places, path="vision.patch_places.")
    (seen,) = wiring.place("patch_embedding", embedding, path="vision.patch_embedding.")
    position = PatchPositions(side, hidden, axis)
    (seen,) = wiring.place("patch_positions", position, ["seen.0"], path="vision.patch_positions.", hidden=seen)
    wiring.share((rotary, mask))
    for i in range(config.count("depth", 27)):
        place = f"layers.{i}"
        (seen,) = wiring.place(
            place, layer, [f"seen.{i + 1}"], context=(rotary, mask), path=f"vision.{place}.", hidden=seen
        )
    merger = PatchMerger(norm, merge, out, axis)
    wiring.place("patch_merger", merger, path="vision.patch_merger.", hidden=seen)
    wiring.give(*merger.outputs)
    tokens = (beside.integer("image_token_id", 248056, least=0), beside.integer("video_token_id", 248057, least=0))
    return wiring.done(), Splice(tokens, out)


TOWER = Tower(
    build=build,
    names={
        "vision.patch_embedding.": VISUAL + "patch_embed.proj.",
        "vision.patch_positions.": VISUAL + "pos_embed.",
        "vision.layers.{i}.self_attn.qkv_proj.": BLOCK + "attn.qkv.",
        "vision.layers.{i}.self_attn.o_proj.": BLOCK + "attn.proj.",
        "vision.layers.{i}.self_attn_input_norm.": BLOCK + "norm1.",
        "vision.layers.{i}.mlp.up_proj.": BLOCK + "mlp.linear_fc1.",
        "vision.layers.{i}.mlp.down_proj.": BLOCK + "mlp.linear_fc2.",
        "vision.layers.{i}.mlp_input_norm.": BLOCK + "norm2.",
        "vision.patch_merger.norm.": VISUAL + "merger.norm.",
        "vision.patch_merger.up_proj.": VISUAL + "merger.linear_fc1.",
        "vision.patch_merger.down_proj.": VISUAL + "merger.linear_fc2.",
    },
    tiny={
        "vision_config": {
            "depth": 2,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_heads": 2,
            "patch_size": 4,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "out_hidden_size": 64,
            "num_position_embeddings": 36,
        },
        "image_token_id": 250,
        "video_token_id": 251,
        "vision_start_token_id": 252,
        "vision_end_token_id": 253,
    },
    words={
        "<|endoftext|>": 247,
        "<|im_start|>": 248,
        "<|im_end|>": 249,
        "<|image_pad|>": 250,
        "<|video_pad|>": 251,
        "<|vision_start|>": 252,
        "<|vision_end|>": 253,
    },
    beside={
        "preprocessor_config.json": {"image_processor_type": "Qwen2VLImageProcessor", **PROCESSOR},
        "video_preprocessor_config.json": {"video_processor_type": "Qwen3VLVideoProcessor", **PROCESSOR, "fps": 2},
        "generation_config.json": {"eos_token_id": [247, 249]},
        "tokenizer_config.json": {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"},
        "chat_template.jinja": TEMPLATE,
    },
)
