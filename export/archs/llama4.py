"""Llama 4, text (transformers modeling_llama4.py): chunked attention with interleaved RoPE, every fourth layer full and
without; temperature; top-1 experts whose score multiplies their input, beside a shared one."""

from llmexport.export.archs.towers.llama4 import TOWER
from llmexport.export.config import Config
from llmexport.export.decoder import BUFFERS, NAMES, TINY, decoder, stacks
from llmexport.export.errors import ExportError
from llmexport.export.spec import (
    Arch,
    Block,
    Experts,
    Mask,
    Mlp,
    Model,
    Moe,
    Multimodal,
    Norm,
    Router,
    SharedExpert,
    Temperature,
    causal_lm,
    decoder_layer,
)
from llmexport.export.values import whole

FORWARD, APART = "model.layers.{i}.feed_forward.", "for_llm_compressor"


def build(config: Config) -> Model:
    d = decoder(config, head_size=128)
    norm, bias, activation = d.norm(1e-5), config.flag("attention_bias"), d.activation()
    intermediate = config.length("intermediate_size", 8192)
    experts, top_k = config.count("num_local_experts", 16), config.count("num_experts_per_tok", 1)
    # Published ones in few bits have nn.Linear for each expert.
    apart = config.flag(APART, False)
    moe = Moe(
        Router(d.hidden, experts, top_k, "sigmoid"),
        Experts(d.hidden, intermediate, experts, top_k, activation, transposed=not apart, scale_input=True),
        SharedExpert(Mlp(d.hidden, intermediate, activation)),
    )
    dense = Mlp(d.hidden, config.length("intermediate_size_mlp", 16384), activation)
    step = config.integer("interleave_moe_layer_step", 1)
    sparse = config.layer_set("moe_layers", range(step - 1, d.layers, step))
    unit = Norm(d.head_size, norm.epsilon, weighted=False) if config.flag("use_qk_norm", True) else None
    rotary = config.rotary(d.head_size, 500000.0)
    turns = d.attention(qkv_bias=bias, out_bias=bias, interleaved=True, qk_norm=unit, qk_norm_place="after_rotary")
    tuned = is_tuned(config)
    temperature = Temperature(config.integer("floor_scale", 8192), config.number("attn_scale", 0.1))
    straight = d.attention(qkv_bias=bias, out_bias=bias, rotated=0, temperature=tuned)
    chunk = config.integer("attention_chunk_size", 8192)
    masks = {"chunked_attention": Mask(chunk=chunk), "full_attention": Mask()}
    turning = rotated(config, d.layers)
    derived = ["chunked_attention" if t else "full_attention" for t in turning]
    layers = []
    for i, (mask, turn) in enumerate(zip(config.layer_types(masks, derived), turning, strict=True)):
        own: tuple[Block, ...] = (rotary,) if turn else (temperature,) if tuned else ()
        block = decoder_layer(norm, turns if turn else straight, norm, moe if i in sparse else dense)
        layers.append((block, (*own, mask)))
    return d.model(layers, norm, tied=False)


def is_tuned(config: Config) -> bool:
    """Whether layers without RoPE have a temperature; the first release wrote a number for true."""
    key = "attn_temperature_tuning"
    counts = type(whole(config.get(key, True))) is int
    return config.integer(key, least=0) > 0 if counts else config.flag(key, True)


def rotated(config: Config, layers: int) -> list[bool]:
    """Which layers have RoPE: no_rope_layers says 1 where one has."""
    interval = config.integer("no_rope_layer_interval", 4)
    # Its name before; transformers reads it no more.
    config.expect("nope_layer_interval", interval)
    found = config.get("no_rope_layers", None) or [int((i + 1) % interval != 0) for i in range(layers)]
    if not isinstance(found, list) or len(found) != layers or any(n not in (0, 1) for n in found):
        raise ExportError(f"config.json: no_rope_layers must list {layers} times 0 or 1")
    return [n == 1 for n in found]


ARCH = Arch(
    model_types=("llama4_text",),
    system="Llama 4",
    adds="chunked attention, layers without RoPE, temperature, top-1 experts; vision: tiles",
    reference=causal_lm("Llama4ForCausalLM", joined=True),
    build=build,
    names={**NAMES, "layers.{i}.mlp.": FORWARD},
    stacks=stacks(FORWARD),
    in_parts=True,
    apart=APART,
    ignore=BUFFERS,
    multimodal=(
        Multimodal(
            model_type="llama4",
            architecture="Llama4ForConditionalGeneration",
            names={"model.": "language_model.model.", "lm_head.": "language_model.lm_head."},
            tower=TOWER,
            left_out=("vision_model.*", "multi_modal_projector.*"),
            harmless=("boi_token_index", "eoi_token_index", "image_token_index", "vision_config"),
        ),
    ),
    tiny={
        **TINY,
        "head_dim": 16,
        "intermediate_size": 48,
        "intermediate_size_mlp": 96,
        "num_hidden_layers": 4,
        "num_local_experts": 4,
        "num_experts_per_tok": 1,
        "interleave_moe_layer_step": 2,
        "attention_chunk_size": 8,
        "floor_scale": 8,
        "attn_scale": 0.1,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 500000.0,
            "factor": 16.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 1.0,
            "original_max_position_embeddings": 32,
        },
    },
)
