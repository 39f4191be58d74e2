"""Gemma 4, text (transformers modeling_gemma4.py): full layers have other heads than sliding ones, norms of q, k and v
take the place of a scale, a factor ends each layer; experts beside the MLP (26B-A4B); inputs of each layer, and layers
that read another's keys (E2B, E4B)."""

import dataclasses

from llmexport.export import spec
from llmexport.export.archs.gemma2 import ACTIVATIONS, NORMS
from llmexport.export.config import Config
from llmexport.export.decoder import BUFFERS, NAMES, TINY, Decoder, decoder
from llmexport.export.errors import ExportError

LAYER = "model.layers.{i}."
ROPE = {"default": "default", "proportional": "proportional"}
BESIDE = ("audio_config", "eoa_token_index", "vision_config", "vision_soft_tokens_per_image")
SLIDES, FULL = "sliding_attention", "full_attention"


def build(config: Config) -> spec.Model:
    # Whether the tokens of a picture see each other: a text has none.
    config.expect("use_bidirectional_attention", None, "vision")
    # Nothing else here means what it means to transformers where it is not there.
    config.get("rope_parameters")
    d = decoder(config, head_size=256)
    derived = [SLIDES if (i + 1) % 6 and i + 1 < d.layers else FULL for i in range(d.layers)]
    kinds = config.layer_types({SLIDES: SLIDES, FULL: FULL}, derived)
    if kinds[-1] != FULL:
        raise ExportError(f"config.json: layer_types ends with {SLIDES}, and the last layer of this model is full")
    full, window = full_layers(config, d, kinds), spec.Mask(config.integer("sliding_window", 512))
    reads = {
        SLIDES: (config.rotary(d.head_size, 10000.0, types={"default": "default"}, layer_kind=SLIDES), window),
        FULL: (config.rotary(full.head_size, None, types=ROPE, layer_kind=FULL), spec.Mask()),
    }
    own = {SLIDES: attention(config, d), FULL: attention(config, full, key_is_value=config.flag("attention_k_eq_v"))}
    shared = config.count("num_kv_shared_layers", 0, least=0)
    lenders = {kind: i for i, kind in enumerate(kinds[: max(d.layers - shared, 0)])}
    if lacking := {*kinds} - {*lenders}:
        raise ExportError(f"config.json: num_kv_shared_layers is {shared}, which leaves no {min(lacking)} to share")
    activation = config.choice("hidden_activation", ACTIVATIONS, "gelu_pytorch_tanh")
    norm, told, layers = d.norm(rounding="after_weight"), per_layer(config, d), []
    for i, kind in enumerate(kinds):
        borrows, lends = i >= d.layers - shared, shared > 0 and lenders[kind] == i
        mixer = dataclasses.replace(own[kind], borrows=borrows, lends=lends)
        wide = config.flag("use_double_wide_mlp") and borrows
        mlp = d.mlp(config.length("intermediate_size") * (2 if wide else 1), activation)
        sublayers = [spec.Sublayer("self_attn", mixer, norm, norm), feed_forward(config, norm, mlp)]
        if told:
            given = spec.PerLayerInput(d.hidden, told.norm.size, activation)
            sublayers.append(spec.Sublayer("per_layer_input", given, output_norm=norm))
        layers.append((spec.Layer(tuple(sublayers), scaled=True), reads[kind]))
    softcap = config.cap("final_logit_softcapping", 0.0)
    return d.model(layers, norm, tied=True, scale=d.hidden**0.5, softcap=softcap, told=told)


def full_layers(config: Config, d: Decoder, kinds: tuple[str, ...]) -> Decoder:
    """The sizes of the layers that see everything."""
    own = config.of_layers([i for i, kind in enumerate(kinds) if kind == FULL], ("head_dim", "num_key_value_heads"))
    if own is None:
        says = config.get("num_global_key_value_heads", None) and config.flag("attention_k_eq_v")
        kv_heads = config.count("num_global_key_value_heads") if says else d.kv_heads
        return dataclasses.replace(d, head_size=config.length("global_head_dim", 512), kv_heads=kv_heads)
    size, kv_heads = own.length("head_dim", d.head_size), own.count("num_key_value_heads", d.kv_heads)
    return dataclasses.replace(d, head_size=size, kv_heads=kv_heads)


def attention(config: Config, d: Decoder, *, key_is_value: bool = False) -> spec.Attention:
    bias, heads = config.flag("attention_bias"), spec.Norm(d.head_size, config.number("rms_norm_eps", 1e-6))
    return d.attention(
        qkv_bias=bias,
        out_bias=bias,
        scale=1.0,
        qk_norm=dataclasses.replace(heads, rounding="after_weight"),
        v_norm=dataclasses.replace(heads, weighted=False),
        key_is_value=key_is_value,
    )


def per_layer(config: Config, d: Decoder) -> spec.PerLayerEmbedding | None:
    """What every layer is told of its tokens, in E2B and E4B."""
    size = config.integer("hidden_size_per_layer_input", 256, least=0)
    vocabulary = config.length("vocab_size_per_layer_input", 262144)
    norm = spec.Norm(size, config.number("rms_norm_eps", 1e-6), rounding="after_weight")
    return spec.PerLayerEmbedding(vocabulary, d.hidden, d.layers, norm) if size else None


def feed_forward(config: Config, norm: spec.Norm, mlp: spec.Mlp) -> spec.Sublayer:
    """The MLP, beside experts if there are any."""
    if not config.flag("enable_moe_block"):
        return spec.Sublayer("mlp", mlp, norm, norm)
    experts, top_k = config.count("num_experts"), config.count("top_k_experts")
    router = spec.Router(mlp.hidden, experts, top_k, "softmax", renormalise=True, expert_scale=True)
    router = dataclasses.replace(router, norm=spec.Norm(mlp.hidden, norm.epsilon), input_scale=mlp.hidden**-0.5)
    routed = spec.Experts(mlp.hidden, config.length("moe_intermediate_size"), experts, top_k, mlp.activation)
    return spec.Sublayer("mlp", spec.MlpWithExperts(norm, mlp, router, routed), output_norm=norm)


ARCH = spec.Arch(
    model_types=("gemma4_text",),
    adds="norms of q, k and v, heads and RoPE by kind of layer, experts beside the MLP, per-layer inputs",
    reference=spec.causal_lm("Gemma4ForCausalLM"),
    build=build,
    names={
        **NAMES,
        **NORMS,
        "per_layer_embedding.": "model.embed_tokens_per_layer.",
        "per_layer_embedding.projection.": "model.per_layer_model_projection.",
        "per_layer_embedding.norm.": "model.per_layer_projection_norm.",
        "layers.{i}.per_layer_input.gate.": LAYER + "per_layer_input_gate.",
        "layers.{i}.per_layer_input.projection.": LAYER + "per_layer_projection.",
        "layers.{i}.per_layer_input_output_norm.": LAYER + "post_per_layer_input_norm.",
        "layers.{i}.mlp.mlp.": LAYER + "mlp.",
        "layers.{i}.mlp.mlp_input_norm.": LAYER + "pre_feedforward_layernorm.",
        "layers.{i}.mlp.mlp_output_norm.": LAYER + "post_feedforward_layernorm_1.",
        "layers.{i}.mlp.experts_input_norm.": LAYER + "pre_feedforward_layernorm_2.",
        "layers.{i}.mlp.experts_output_norm.": LAYER + "post_feedforward_layernorm_2.",
        "layers.{i}.mlp.experts.": LAYER + "experts.",
        "layers.{i}.mlp.router.": LAYER + "router.proj.",
        "layers.{i}.mlp.router.norm.weight": LAYER + "router.scale",
        "layers.{i}.mlp.router.expert_scale": LAYER + "router.per_expert_scale",
    },
    ignore=BUFFERS,
    multimodal=(
        spec.Multimodal(
            model_type="gemma4",
            architecture="Gemma4ForConditionalGeneration",
            names={"model.": "model.language_model."},
            left_out=("model.vision_tower.*", "model.embed_vision.*", "model.audio_tower.*", "model.embed_audio.*"),
            harmless=(*BESIDE, *(f"{n}_token_id" for n in ("audio", "boa", "boi", "eoa", "eoi", "image", "video"))),
        ),
    ),
    tiny={
        **{k: v for k, v in TINY.items() if k not in ("hidden_act", "rope_parameters")},
        "head_dim": 32,
        "hidden_activation": "gelu_pytorch_tanh",
        "sliding_window": 8,
        "per_layer_config": {"2": {"head_dim": 64, "num_key_value_heads": 1}},
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
            "full_attention": {"rope_type": "proportional", "rope_theta": 1000000.0, "partial_rotary_factor": 0.25},
        },
        "attention_k_eq_v": True,
        "hidden_size_per_layer_input": 0,
        "vocab_size_per_layer_input": 256,
        "final_logit_softcapping": 30.0,
        "tie_word_embeddings": True,
    },
)
