"""Llama 1 to 3.3 (transformers modeling_llama.py), llama3 RoPE scaling included, and who followed it to the letter: Yi,
DeepSeek LLM and Coder by its own name, Skywork with a copy of its code."""

from llmexport.export.config import Config
from llmexport.export.decoder import BUFFERS, NAMES, TINY, decoder
from llmexport.export.spec import Arch, Mask, Model, causal_lm, decoder_layer

# Skywork's.
CODE = {
    "AutoConfig": "configuration_skywork.SkyworkConfig",
    "AutoModel": "modeling_skywork.SkyworkModel",
    "AutoModelForCausalLM": "modeling_skywork.SkyworkForCausalLM",
}


def build(config: Config) -> Model:
    config.expect_code(CODE)
    config.expect("rope_interleaved", False)
    config.expect("is_llama_config", True)
    bias = config.flag("attention_bias")
    d = decoder(config, grouped=False)
    norm = d.norm()
    layer = decoder_layer(norm, d.attention(qkv_bias=bias, out_bias=bias), norm, d.mlp(bias=config.flag("mlp_bias")))
    return d.model([(layer, (config.rotary(d.head_size), Mask()))] * d.layers, norm, tied=False)


ARCH = Arch(
    model_types=("llama", "skywork"),
    system="Llama 1, 2, 3, Skywork, Yi, DeepSeek LLM and Coder",
    adds="llama3 and linear RoPE scaling, optional biases",
    reference=causal_lm("LlamaForCausalLM", copies=("SkyworkForCausalLM",)),
    build=build,
    names=NAMES,
    ignore=BUFFERS,
    tiny={
        **TINY,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 500000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
        "attention_bias": False,
        "mlp_bias": False,
    },
)
