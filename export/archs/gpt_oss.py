"""GPT-OSS (transformers modeling_gpt_oss.py): attention sinks, alternating windows, YaRN, clamped experts, MXFP4."""

from llmexport.export import quantised
from llmexport.export.config import Config
from llmexport.export.decoder import BUFFERS, NAMES, TINY, decoder
from llmexport.export.errors import ExportError
from llmexport.export.packed.scheme import MXFP4, method_of
from llmexport.export.spec import Arch, Experts, Model, Moe, Mxfp4, Plain, Router, Span, causal_lm, decoder_layer

EXPERTS = "model.layers.{i}.mlp.experts."


def build(config: Config) -> Model:
    d = decoder(config, head_size=64)
    norm = d.norm(1e-5, rounding="after_weight")
    experts, top_k = config.count("num_local_experts", 128), config.count("num_experts_per_tok", 4)
    if config.count("experts_per_token", top_k) != top_k:
        raise ExportError("config.json: experts_per_token and num_experts_per_tok differ: remove one")
    storage = Mxfp4() if mxfp4(config) else Plain()
    moe = Moe(
        Router(d.hidden, experts, top_k, "softmax_top_k", bias=True),
        Experts(
            d.hidden,
            config.length("intermediate_size"),
            experts,
            top_k,
            activation="swiglu_clamped",
            alpha=config.number("swiglu_alpha", 1.702),
            limit=config.number("swiglu_limit", 7.0),
            transposed=storage == Plain(),
            interleaved=True,
            bias=True,
            storage=storage,
        ),
    )
    config.expect("hidden_act", "silu")
    # Said again by RoPE's parameters, which is where it is read.
    config.get("initial_context_length", None)
    bias = config.flag("attention_bias", True)
    window = config.integer("sliding_window", 128)
    derived = ["full_attention" if i % 2 else "sliding_attention" for i in range(d.layers)]
    # transformers then means YaRN, of numbers that every published config writes itself.
    if not (config.get("rope_parameters", None) or config.get("rope_scaling", None)):
        raise ExportError("config.json says nothing of RoPE: write its rope_parameters, as those of gpt-oss-20b")
    reads = (config.rotary(d.head_size, 150000.0), Span())
    layers = []
    for own in config.layer_types({"full_attention": 0, "sliding_attention": window}, derived):
        attention = d.attention(qkv_bias=bias, out_bias=bias, sinks=True, window=own)
        layers.append((decoder_layer(norm, attention, norm, moe), reads))
    return d.model(layers, norm, tied=False)


def mxfp4(config: Config) -> bool:
    """Whether the experts are stored in 4 bits. Raises ExportError on any other quantisation."""
    found = config.get("quantization_config", None)
    if found is None or (isinstance(found, dict) and method_of(found)):
        return False
    if not isinstance(found, dict) or found.get("quant_method") != MXFP4:
        raise quantised.refusal("config.json: quantization_config", quantised.describe(found), known=MXFP4)
    return not found.get("dequantize", False)


ARCH = Arch(
    model_types=("gpt_oss",),
    system="GPT-OSS",
    adds="attention sinks, alternating windows, YaRN, clamped experts, MXFP4",
    reference=causal_lm("GptOssForCausalLM", joined=True),
    build=build,
    names=NAMES,
    # One by one, gate and up of an expert in one matrix.
    stacks={f"{EXPERTS}{n}_proj": (f"{EXPERTS}{n}_projs.{{e}}.weight",) for n in ("gate_up", "down")},
    ignore=BUFFERS,
    # onnxruntime-genai pull request 2444: its last layer passes 65504, every logit is NaN.
    overflows_float16="published GPT-OSS checkpoints overflow float16 in their last layers",
    tiny={
        **TINY,
        "intermediate_size": 32,
        "head_dim": 16,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "sliding_window": 8,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 150000.0,
            "factor": 32.0,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "truncate": False,
            "original_max_position_embeddings": 16,
        },
    },
)
