"""Gemma 2 (transformers modeling_gemma2.py): sandwich norms, soft caps on logits, every other layer slides."""

from llmexport.export.config import Config
from llmexport.export.decoder import BUFFERS, NAMES, TINY, decoder
from llmexport.export.spec import Arch, Mask, Model, Span, causal_lm, decoder_layer

# The norms of Gemma 2 and 3, whose post_attention_layernorm follows the attention.
NORMS = {
    "layers.{i}.self_attn_output_norm.": "model.layers.{i}.post_attention_layernorm.",
    "layers.{i}.mlp_input_norm.": "model.layers.{i}.pre_feedforward_layernorm.",
    "layers.{i}.mlp_output_norm.": "model.layers.{i}.post_feedforward_layernorm.",
}
ACTIVATIONS = {"gelu_pytorch_tanh": "gelu_tanh"}


def build(config: Config) -> Model:
    config.expect("use_bidirectional_attention", False, None)
    config.choice("hidden_act", ACTIVATIONS, "gelu_pytorch_tanh")
    bias = config.flag("attention_bias")
    d = decoder(config, head_size=256)
    norm = d.norm(offset=1.0, rounding="after_weight")
    mlp = d.mlp(activation=config.choice("hidden_activation", ACTIVATIONS, "gelu_pytorch_tanh"))
    softcap = config.cap("attn_logit_softcapping", absent=50.0)
    scale = config.number("query_pre_attn_scalar", 256) ** -0.5
    rotary = config.rotary(d.head_size)
    window = config.integer("sliding_window", 4096)
    derived = ["full_attention" if i % 2 else "sliding_attention" for i in range(d.layers)]
    layers = []
    for slides in config.layer_types({"full_attention": False, "sliding_attention": True}, derived):
        own = window if slides else 0
        attention = d.attention(
            qkv_bias=bias, out_bias=bias, scale=scale, softcap=softcap, window=own if softcap else 0
        )
        block = decoder_layer(norm, attention, norm, mlp, mixer_output_norm=norm, mlp_output_norm=norm)
        layers.append((block, (rotary, Span() if softcap else Mask(own or None))))
    head_cap = config.cap("final_logit_softcapping", absent=30.0)
    return d.model(layers, norm, tied=True, scale=d.hidden**0.5, softcap=head_cap)


ARCH = Arch(
    model_types=("gemma2",),
    adds="sandwich norms, soft caps on attention and final logits",
    reference=causal_lm("Gemma2ForCausalLM"),
    build=build,
    names={**NAMES, **NORMS},
    ignore=BUFFERS,
    # vLLM refuses float16 for it (_FLOAT16_NOT_SUPPORTED_MODELS of vllm/config/model.py).
    overflows_float16="published Gemma 2 checkpoints are numerically unstable in float16",
    tiny={
        **{k: v for k, v in TINY.items() if k != "hidden_act"},
        "head_dim": 32,
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": 24,
        "sliding_window": 8,
        "attn_logit_softcapping": 2.0,
        "final_logit_softcapping": 3.0,
        "tie_word_embeddings": True,
    },
)
