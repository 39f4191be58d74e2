"""RWKV-7 (arXiv 2503.14456; flash-linear-attention's modeling_rwkv7.py): no attention, but a generalised delta rule."""

import math

from llmexport.export.config import Config
from llmexport.export.errors import ExportError
from llmexport.export.spec import (
    Arch,
    DeltaTimeMix,
    Embedding,
    Head,
    Layer,
    Model,
    Norm,
    Presence,
    ShiftedMlp,
    Sublayer,
    causal_lm,
)
from llmexport.export.stack import wired
from llmexport.export.values import show

CODE = {
    "AutoConfig": "configuration_rwkv7.RWKV7Config",
    "AutoModel": "modeling_rwkv7.RWKV7Model",
    "AutoModelForCausalLM": "modeling_rwkv7.RWKV7ForCausalLM",
}
# Which of its kernels computes, and how it is trained.
HARMLESS = ("attn_mode", "fuse_cross_entropy", "fuse_linear_cross_entropy", "fuse_norm", "use_l2warp")
MULTIPLE = 32  # of which the width that no key says is one


def build(config: Config) -> Model:
    config.expect_code(CODE)
    config.leave(HARMLESS)
    # Layers of attention between the others.
    config.expect("attn", None)
    config.expect("hidden_act", "sqrelu")
    hidden, layers = config.length("hidden_size"), config.count("num_hidden_layers")
    size, vocabulary = config.length("head_dim", 64), config.length("vocab_size")
    if hidden % size:
        raise ExportError(f"config.json: hidden_size {hidden} is not a multiple of head_dim {size}")
    if config.get("num_heads", None) not in (None, hidden // size):
        raise ExportError(f"config.json: num_heads must be {hidden // size}, hidden_size / head_dim")
    if (widths := config.get("value_dim", None)) not in (None, hidden, [hidden] * layers):
        raise ExportError(f"config.json: value_dim is {show(widths)}, only hidden_size, {hidden}, is supported")
    epsilon, bias = config.number("norm_eps", 1e-5), config.flag("norm_bias", True)
    norm = Norm(hidden, epsilon, statistics="layer", bias=bias)
    widths = (("decay", 64), ("a", 64), ("v", 16), ("gate", 128))
    decay, rate, value, gate = (config.length(f"{name}_low_rank_dim", width) for name, width in widths)
    channel = ShiftedMlp(hidden, _width(config, hidden))

    def layer(i: int) -> Layer:
        time = DeltaTimeMix(hidden, size, decay, rate, value, gate, size * epsilon, first=i == 0)
        return Layer((Sublayer("attn", time, norm), Sublayer("ffn", channel, norm)))

    embedding = Embedding(vocabulary, hidden, norm=norm if config.flag("norm_first", True) else None)
    tied = config.flag("tie_word_embeddings")
    stack = [(layer(i), (Presence(),)) for i in range(layers)]
    return wired(embedding, stack, Head(norm, vocabulary), tied=tied, static=config.static)


def _width(config: Config, hidden: int) -> int:
    """Of the keys of an MLP: a key says it, or how many times the hidden size."""
    ratio = 4.0 if config.get("hidden_ratio", None) is None else config.number("hidden_ratio", 4.0)
    if config.get("intermediate_size", None) is not None:
        return config.length("intermediate_size")
    return MULTIPLE * math.ceil(int(hidden * ratio) / MULTIPLE)


ARCH = Arch(
    model_types=("rwkv7",),
    system="RWKV-7 (Goose)",
    adds="a generalised delta rule: removes by one key, writes by another; the first layer's values in all",
    reference=causal_lm("RWKV7ForCausalLM", made_by="rwkv7"),
    build=build,
    names={
        "embedding.": "model.embeddings.",
        "embedding.norm.": "model.layers.0.pre_norm.",
        "layers.{i}.": "model.layers.{i}.",
        "layers.{i}.attn_input_norm.": "model.layers.{i}.attn_norm.",
        "layers.{i}.ffn_input_norm.": "model.layers.{i}.ffn_norm.",
        "head.norm.": "model.norm.",
        "head.projection.": "lm_head.",
    },
    tiny={
        "vocab_size": 256,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "head_dim": 16,
        "decay_low_rank_dim": 12,
        "a_low_rank_dim": 10,
        "v_low_rank_dim": 8,
        "gate_low_rank_dim": 14,
        "hidden_act": "sqrelu",
        "norm_first": True,
        "norm_bias": True,
        "norm_eps": 1e-5,
        "max_position_embeddings": 512,
        "tie_word_embeddings": False,
    },
)
