"""ChatGLM2, ChatGLM3 and GLM-4 in the layout of their own code (THUDM's modeling_chatglm.py)."""

from llmexport.export.config import Config
from llmexport.export.decoder import Decoder
from llmexport.export.spec import Arch, Mask, Model, Norm, Rotary, causal_lm, decoder_layer

CODE = {
    "AutoConfig": "configuration_chatglm.ChatGLMConfig",
    "AutoModel": "modeling_chatglm.ChatGLMForConditionalGeneration",
    "AutoModelForCausalLM": "modeling_chatglm.ChatGLMForConditionalGeneration",
    "AutoModelForSeq2SeqLM": "modeling_chatglm.ChatGLMForConditionalGeneration",
    "AutoModelForSequenceClassification": "modeling_chatglm.ChatGLMForSequenceClassification",
    "AutoTokenizer": "tokenization_chatglm.ChatGLM4Tokenizer",
}
LAYER = "transformer.encoder.layers.{i}."
# How it is trained and run; scores are divided by the number of the layer and multiplied by it again.
HARMLESS = (
    "apply_query_key_layer_scaling",
    "attention_softmax_in_fp32",
    "bias_dropout_fusion",
    "seq_length",
    "fp32_residual_connection",
    "prefix_projection",
)


def build(config: Config) -> Model:
    config.expect_code(CODE)
    for key in ("rmsnorm", "post_layer_norm", "multi_query_attention", "original_rope"):
        config.expect(key, True)
    for key in ("apply_residual_connection_post_layernorm", "add_bias_linear"):
        config.expect(key, False)
    config.expect("interleaved_qkv", False)
    config.expect("quantization_bit", 0)
    config.expect("pre_seq_len", None)
    config.leave(HARMLESS)
    layers = config.count("num_layers")
    config.expect("num_hidden_layers", layers)
    d = Decoder(
        config,
        config.length("hidden_size"),
        config.count("num_attention_heads"),
        config.count("multi_query_group_num"),
        config.length("kv_channels", 128),
        layers,
        config.length("padded_vocab_size"),
    )
    config.expect("vocab_size", d.vocabulary)
    # A position turns half of a head, in pairs that are neighbours.
    rotary = Rotary(d.head_size // 2, 10000.0 * config.number("rope_ratio", 1.0))
    norm = Norm(d.hidden, config.number("layernorm_epsilon", 1e-5))
    bias = config.flag("add_qkv_bias")
    attention = d.attention(fused=True, qkv_bias=bias, rotated=rotary.size, interleaved=True)
    mlp = d.mlp(config.length("ffn_hidden_size"), "silu", fused=True)
    return d.model([(decoder_layer(norm, attention, norm, mlp), (rotary, Mask()))] * layers, norm, tied=False)


ARCH = Arch(
    model_types=("chatglm",),
    system="ChatGLM2, ChatGLM3, GLM-4",
    adds="fused q, k, v of two groups, fused gate and up, interleaved half RoPE",
    reference=causal_lm(
        "ChatGLMForConditionalGeneration", made_by="chatglm", aliases=("ChatGLMModel", "ChatGLMForCausalLM")
    ),
    build=build,
    names={
        "embedding.": "transformer.embedding.word_embeddings.",
        "layers.{i}.self_attn_input_norm.": LAYER + "input_layernorm.",
        "layers.{i}.self_attn.qkv_proj.": LAYER + "self_attention.query_key_value.",
        "layers.{i}.self_attn.o_proj.": LAYER + "self_attention.dense.",
        "layers.{i}.mlp_input_norm.": LAYER + "post_attention_layernorm.",
        "layers.{i}.mlp.gate_up_proj.": LAYER + "mlp.dense_h_to_4h.",
        "layers.{i}.mlp.down_proj.": LAYER + "mlp.dense_4h_to_h.",
        "head.norm.": "transformer.encoder.final_layernorm.",
        "head.projection.": "transformer.output_layer.",
    },
    base="transformer.",
    ignore=("transformer.rotary_pos_emb.inv_freq",),
    tiny={
        "add_bias_linear": False,
        "add_qkv_bias": True,
        "apply_residual_connection_post_layernorm": False,
        "ffn_hidden_size": 96,
        "hidden_size": 64,
        "kv_channels": 16,
        "layernorm_epsilon": 1e-5,
        "multi_query_attention": True,
        "multi_query_group_num": 2,
        "num_attention_heads": 6,
        "num_layers": 3,
        "original_rope": True,
        "padded_vocab_size": 256,
        "post_layer_norm": True,
        "rmsnorm": True,
        "rope_ratio": 50,
        "seq_length": 512,
        "tie_word_embeddings": False,
    },
)
