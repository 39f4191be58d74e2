"""Qwen of 2023 (modeling_qwen.py of its checkpoints): Llama with a fused q, k, v that has a bias, and w1 * silu(w2).

What it does to texts that are longer than those it was trained on (theta by the length of the prompt, log n times q)
changes nothing up to seq_length, which is as far as the export goes.
"""

from llmexport.export.config import Config
from llmexport.export.decoder import TINY, Decoder
from llmexport.export.errors import ExportError
from llmexport.export.rope import within
from llmexport.export.spec import Arch, Mask, Model, Norm, Rotary, causal_lm, decoder_layer

CODE = {"AutoConfig": "configuration_qwen.QWenConfig", "AutoModelForCausalLM": "modeling_qwen.QWenLMHeadModel"}
LAYER = "transformer.h.{i}."
# How it is run, and not what it computes.
HARMLESS = (
    "attn_dropout_prob",
    "emb_dropout_prob",
    "bf16",
    "fp16",
    "fp32",
    "onnx_safe",
    "softmax_in_fp32",
    "tokenizer_type",
    "use_cache_kernel",
    "use_cache_quantization",
    "padded_vocab_size",
    "max_position_embeddings",
)


def build(config: Config) -> Model:
    config.expect_code(CODE)
    config.expect("scale_attn_weights", True)
    config.expect("rotary_pct", 1.0)
    config.leave(HARMLESS)
    heads, size = config.count("num_attention_heads"), config.length("kv_channels", 128)
    intermediate = config.length("intermediate_size")
    if intermediate % 2:
        raise ExportError(
            f"config.json: intermediate_size is {intermediate}, the widths of w1 and w2 together: take two"
        )
    d = Decoder(
        config,
        config.length("hidden_size"),
        heads,
        heads,
        size,
        config.count("num_hidden_layers"),
        config.length("vocab_size"),
    )
    norm = Norm(d.hidden, config.number("layer_norm_epsilon", 1e-6))
    attention = d.attention(fused=True, qkv_bias=True, out_bias=not config.flag("no_bias", True))
    bias = not config.flag("no_bias", True)
    layer = decoder_layer(norm, attention, norm, d.mlp(intermediate // 2, "silu", bias=bias))
    theta = config.number("rotary_emb_base", 10000.0)
    config.expect("rope_theta", theta)
    longer = [k for k in ("use_dynamic_ntk", "use_logn_attn") if config.flag(k, True)]
    config.get("seq_length", None)
    places = within(config, " and ".join(longer), "seq_length") if longer else None
    return d.model([(layer, (Rotary(size, theta, places=places), Mask()))] * d.layers, norm, tied=False)


ARCH = Arch(
    model_types=("qwen",),
    system="Qwen 1",
    adds="fused q, k, v with bias",
    reference=causal_lm("QWenLMHeadModel", made_by="qwen"),
    build=build,
    names={
        "embedding.": "transformer.wte.",
        "layers.{i}.self_attn_input_norm.": LAYER + "ln_1.",
        "layers.{i}.self_attn.qkv_proj.": LAYER + "attn.c_attn.",
        "layers.{i}.self_attn.o_proj.": LAYER + "attn.c_proj.",
        "layers.{i}.mlp_input_norm.": LAYER + "ln_2.",
        "layers.{i}.mlp.gate_proj.": LAYER + "mlp.w2.",
        "layers.{i}.mlp.up_proj.": LAYER + "mlp.w1.",
        "layers.{i}.mlp.down_proj.": LAYER + "mlp.c_proj.",
        "head.norm.": "transformer.ln_f.",
        "head.projection.": "lm_head.",
    },
    base="transformer.",
    ignore=("transformer.rotary_emb.inv_freq", "transformer.h.*.attn.rotary_emb.inv_freq"),
    tiny={
        **{k: TINY[k] for k in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")},
        "intermediate_size": 192,
        "kv_channels": 16,
        "layer_norm_epsilon": 1e-6,
        "max_position_embeddings": 1024,
        "no_bias": True,
        "rotary_emb_base": 20000,
        "rotary_pct": 1.0,
        "scale_attn_weights": True,
        "seq_length": 512,
        "tie_word_embeddings": False,
        "use_dynamic_ntk": True,
        "use_logn_attn": True,
    },
)
