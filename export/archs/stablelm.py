"""StableLM (transformers modeling_stablelm.py): Llama with LayerNorm and partial RoPE; some with both side by side."""

from llmexport.export.config import Config
from llmexport.export.decoder import BUFFERS, NAMES, TINY, decoder
from llmexport.export.spec import Arch, Mask, Model, Norm, causal_lm, decoder_layer

NORMS = {n: f"model.layers.{{i}}.self_attn.{n}_layernorm." for n in ("q", "k")}


def build(config: Config) -> Model:
    d = decoder(config)
    rotary = config.rotary(d.head_size, partial=0.25)
    epsilon = config.number("layer_norm_eps", 1e-5)
    norm = Norm(d.hidden, epsilon, statistics="layer", bias=True)
    heads = Norm(d.head_size, epsilon, statistics="layer")
    own = {"qk_norm": heads, "qk_norm_over": "each_head"} if config.flag("qk_layernorm") else {}
    attention = d.attention(qkv_bias=config.flag("use_qkv_bias"), rotated=rotary.size, **own)
    parallel = config.flag("use_parallel_residual")
    layer = decoder_layer(norm, attention, None if parallel else norm, d.mlp(), parallel=parallel)
    return d.model([(layer, (rotary, Mask()))] * d.layers, norm, tied=False)


ARCH = Arch(
    model_types=("stablelm",),
    adds="LayerNorm with bias, partial RoPE, a LayerNorm for each head of q and k",
    reference=causal_lm("StableLmForCausalLM"),
    build=build,
    names={**NAMES, **{f"layers.{{i}}.self_attn.{n}_norm.": name for n, name in NORMS.items()}},
    # The norm of every head is a tensor of its own.
    stacks={f"{name}weight": (f"{name}norms.{{e}}.weight",) for name in NORMS.values()},
    in_parts=True,
    ignore=BUFFERS,
    tiny={
        **{k: v for k, v in TINY.items() if k != "rms_norm_eps"},
        "layer_norm_eps": 1e-5,
        "qk_layernorm": False,
        "use_parallel_residual": False,
        "use_qkv_bias": True,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.25},
    },
)
