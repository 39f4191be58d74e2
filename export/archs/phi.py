"""Phi-1, Phi-1.5 and Phi-2 (transformers modeling_phi.py): attention and MLP side by side, partial RoPE, biases."""

from llmexport.export.config import Config
from llmexport.export.decoder import BUFFERS, NAMES, PLAIN, TINY, decoder
from llmexport.export.spec import Arch, Mask, Model, Norm, causal_lm, decoder_layer

LAYER = "model.layers.{i}."
# Microsoft's code, which transformers took over.
CODE = {"AutoConfig": "configuration_phi.PhiConfig", "AutoModelForCausalLM": "modeling_phi.PhiForCausalLM"}


def build(config: Config) -> Model:
    config.expect_code(CODE)
    d = decoder(config, grouped=False)
    rotary = config.rotary(d.head_size, partial=0.5)
    epsilon = config.number("layer_norm_eps", 1e-5)
    norm, heads = (Norm(size, epsilon, statistics="layer", bias=True) for size in (d.hidden, d.head_size))
    own = {"qk_norm": heads} if config.flag("qk_layernorm") else {}
    mlp = d.mlp(activation=config.choice("hidden_act", PLAIN, "gelu_new"), bias=True, gated=False)
    attention = d.attention(qkv_bias=True, out_bias=True, rotated=rotary.size, **own)
    layer = decoder_layer(norm, attention, None, mlp, parallel=True)
    return d.model([(layer, (rotary, Mask()))] * d.layers, norm, tied=False, head_bias=True)


ARCH = Arch(
    model_types=("phi",),
    adds="attention and MLP side by side, partial RoPE, LayerNorm, a bias on every matrix and the head",
    reference=causal_lm("PhiForCausalLM"),
    build=build,
    names={
        **NAMES,
        "layers.{i}.self_attn.o_proj.": f"{LAYER}self_attn.dense.",
        "layers.{i}.self_attn.q_norm.": f"{LAYER}self_attn.q_layernorm.",
        "layers.{i}.self_attn.k_norm.": f"{LAYER}self_attn.k_layernorm.",
        "layers.{i}.mlp.up_proj.": f"{LAYER}mlp.fc1.",
        "layers.{i}.mlp.down_proj.": f"{LAYER}mlp.fc2.",
        "head.norm.": "model.final_layernorm.",
        "head.bias": "lm_head.bias",
    },
    ignore=BUFFERS,
    tiny={
        **{k: v for k, v in TINY.items() if k != "rms_norm_eps"},
        "hidden_act": "gelu_new",
        "layer_norm_eps": 1e-5,
        "qk_layernorm": False,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5},
    },
)
