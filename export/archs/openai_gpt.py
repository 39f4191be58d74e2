"""GPT, the first of them (transformers modeling_openai.py): learned positions, norms of sums, matrices [in, out].

transformers keeps no cache of it; the decoder here does.
"""

from typing import Any

from llmexport.export.config import Config
from llmexport.export.decoder import head_size
from llmexport.export.spec import Arch, Attention, Embedding, Head, Layer, Mask, Mlp, Model, Norm, Reference, Sublayer
from llmexport.export.stack import wired

# Its "gelu" is the one by tanh.
ACTIVATIONS = {"gelu": "gelu_tanh", "relu": "relu", "silu": "silu", "swish": "silu"}


def build(config: Config) -> Model:
    hidden, heads, positions = config.length("n_embd"), config.count("n_head"), config.length("n_positions")
    config.expect("max_position_embeddings", positions)
    # The side of a mask that old checkpoints store.
    config.get("n_ctx", None)
    norm = Norm(hidden, config.number("layer_norm_epsilon", 1e-5), statistics="layer", bias=True)
    fields: dict[str, Any] = {"qkv_bias": True, "out_bias": True, "fused": True, "transposed": True, "rotated": 0}
    attention = Attention(hidden, heads, heads, head_size(hidden, heads, "n_embd"), **fields)
    activation = config.choice("afn", ACTIVATIONS, "gelu")
    mlp = Mlp(hidden, 4 * hidden, activation, bias=True, gated=False, transposed=True)
    layer = Layer((Sublayer("self_attn", attention, sum_norm=norm), Sublayer("mlp", mlp, sum_norm=norm)))
    vocabulary, tied = config.length("vocab_size"), config.flag("tie_word_embeddings", True)
    embedding = Embedding(vocabulary, hidden, positions=positions, offset=0)
    layers = [(layer, (Mask(),))] * config.count("n_layer")
    return wired(embedding, layers, Head(None, vocabulary, hidden=hidden), tied=tied, static=config.static)


ARCH = Arch(
    model_types=("openai-gpt",),
    system="GPT",
    adds="norms on sums, learned positions, fused matrices [in, out], no final norm",
    reference=Reference("OpenAIGPTLMHeadModel", {"logits": "logits"}, cached=False),
    build=build,
    names={
        "embedding.": "transformer.tokens_embed.",
        "embedding.positions.": "transformer.positions_embed.",
        "layers.{i}.self_attn.qkv_proj.": "transformer.h.{i}.attn.c_attn.",
        "layers.{i}.self_attn.o_proj.": "transformer.h.{i}.attn.c_proj.",
        "layers.{i}.self_attn_sum_norm.": "transformer.h.{i}.ln_1.",
        "layers.{i}.mlp.up_proj.": "transformer.h.{i}.mlp.c_fc.",
        "layers.{i}.mlp.down_proj.": "transformer.h.{i}.mlp.c_proj.",
        "layers.{i}.mlp_sum_norm.": "transformer.h.{i}.ln_2.",
        "head.projection.": "lm_head.",
    },
    base="transformer.",
    ignore=("transformer.h.*.attn.bias", "transformer.position_ids"),
    tiny={
        "vocab_size": 256,
        "n_embd": 64,
        "n_layer": 3,
        "n_head": 4,
        "n_positions": 512,
        "afn": "gelu",
        "layer_norm_epsilon": 1e-5,
        "tie_word_embeddings": True,
    },
)
