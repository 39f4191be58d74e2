"""ChatGLM-6B (THUDM's modeling_chatglm.py of that release): a prefix that all see, and two places of each token."""

from llmexport.export.archs.chatglm import CODE
from llmexport.export.config import Config
from llmexport.export.decoder import Decoder, head_size
from llmexport.export.spec import (
    Arch,
    Layer,
    Mask,
    Mlp,
    Model,
    Norm,
    Passage,
    Rotary,
    Sublayer,
    causal_lm,
)

LAYER = "transformer.layers.{i}."
# Special words that no block reads, how long texts are, and how it was tuned.
HARMLESS = ("max_sequence_length", "prefix_projection")


def build(config: Config) -> Model:
    config.expect_code(CODE)
    config.expect("position_encoding_2d", True)
    config.expect("quantization_bit", 0)
    config.expect("pre_seq_len", None)
    config.leave(HARMLESS)
    hidden, heads, layers = (
        config.length("hidden_size"),
        config.count("num_attention_heads"),
        config.count("num_layers"),
    )
    d = Decoder(config, hidden, heads, heads, head_size(hidden, heads), layers, config.length("vocab_size"))
    norm = Norm(hidden, config.number("layernorm_epsilon", 1e-5), statistics="layer", bias=True)
    # Scores are divided by the number of the layer and multiplied by it again.
    attention = d.attention(fused=True, grouped=True, qkv_bias=True, out_bias=True, halves=True)
    mlp = Mlp(hidden, config.length("inner_hidden_size"), "gelu_tanh", bias=True, gated=False)
    kept = (2 * layers) ** 0.5
    sublayers = (("self_attn", attention), ("mlp", mlp))
    layer = Layer(tuple(Sublayer(n, block, norm, kept=kept, from_normed=True) for n, block in sublayers))
    words = [config.integer(f"{n}_token_id", least=0) for n in ("bos", "gmask", "mask")]
    passage = Passage(words[0], (words[1], words[2]))
    reads = (passage, Rotary(d.head_size, 10000.0, halves=True), Mask(prefixed=True))
    return d.model([(layer, reads)] * layers, norm, tied=False)


ARCH = Arch(
    model_types=("chatglm",),
    told_by="position_encoding_2d",
    system="ChatGLM",
    adds="a prefix that all see, two places of each token, residuals of normed inputs times a factor",
    reference=causal_lm("ChatGLMForConditionalGeneration", made_by="chatglm_6b", aliases=("ChatGLMModel",)),
    build=build,
    names={
        "embedding.": "transformer.word_embeddings.",
        "layers.{i}.self_attn_input_norm.": LAYER + "input_layernorm.",
        "layers.{i}.self_attn.qkv_proj.": LAYER + "attention.query_key_value.",
        "layers.{i}.self_attn.o_proj.": LAYER + "attention.dense.",
        "layers.{i}.mlp_input_norm.": LAYER + "post_attention_layernorm.",
        "layers.{i}.mlp.up_proj.": LAYER + "mlp.dense_h_to_4h.",
        "layers.{i}.mlp.down_proj.": LAYER + "mlp.dense_4h_to_h.",
        "head.norm.": "transformer.final_layernorm.",
        "head.projection.": "lm_head.",
    },
    base="transformer.",
    ignore=("transformer.layers.*.attention.rotary_emb.inv_freq",),
    tiny={
        "bos_token_id": 256,
        "gmask_token_id": 257,
        "mask_token_id": 258,
        "hidden_size": 64,
        "inner_hidden_size": 128,
        "layernorm_epsilon": 1e-5,
        "max_sequence_length": 512,
        "num_attention_heads": 4,
        "num_layers": 3,
        "pad_token_id": 3,
        "position_encoding_2d": True,
        "vocab_size": 264,
    },
)
