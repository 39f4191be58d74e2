"""T5 v1.0, v1.1 and Flan-T5 (transformers modeling_t5.py): an encoder and a decoder, relative buckets."""

from llmexport.export.config import Config
from llmexport.export.encoder_decoder import Sizes, paired
from llmexport.export.errors import ExportError
from llmexport.export.spec import Arch, Head, Mlp, Model, Norm, causal_lm

# The activation, and whether there is a gate.
FEED_FORWARD = {"relu": ("relu", False), "gated-gelu": ("gelu_tanh", True), "gated-silu": ("silu", True)}
CROSS = "decoder.block.{i}.layer.1."
SAID_AGAIN = {"relu": "relu", "gated-gelu": "gelu_new", "gated-silu": "silu"}


def build(config: Config) -> Model:
    config.expect("is_encoder_decoder", True)
    # What training was told, and the length of its texts, which no table has.
    config.get("n_positions", None)
    if config.static is not None:
        raise ExportError("--cache static: an encoder-decoder has a dynamic cache here: leave --cache out")
    hidden, vocabulary = config.length("d_model"), config.length("vocab_size")
    activation, gated = config.choice("feed_forward_proj", FEED_FORWARD, "relu")
    # What newer releases write beside it.
    config.expect("dense_act_fn", SAID_AGAIN[config.get("feed_forward_proj", "relu")])
    config.expect("is_gated_act", gated)
    norm, layers = Norm(hidden, config.number("layer_norm_epsilon", 1e-6)), config.count("num_layers")
    sizes = Sizes(
        vocabulary,
        norm,
        Mlp(hidden, config.length("d_ff"), activation, gated=gated),
        heads=config.count("num_heads"),
        head_size=config.length("d_kv"),
        buckets=config.count("relative_attention_num_buckets", 32),
        distance=config.length("relative_attention_max_distance", 128),
        encoder_layers=layers,
        decoder_layers=config.count("num_decoder_layers", layers),
    )
    # v1.1 says by an untied head that logits are not scaled; what transformers 5 saves says it by a key of its own.
    scaled = config.flag("scale_decoder_outputs", config.flag("tie_word_embeddings", True))
    head = Head(norm, vocabulary, scale=hidden**-0.5 if scaled else 1.0)
    return paired(sizes, head, mlp="gated_mlp" if gated else "mlp")


def _side(name: str, mlp: int) -> dict[str, str]:
    """The published names of a side, whose `mlp`-th sublayer is the feed-forward one."""
    ours, theirs = f"{name}.layers.{{i}}.", f"{name}.block.{{i}}.layer."
    self_attn = {f"{ours}self_attn.{p}_proj.": f"{theirs}0.SelfAttention.{p}." for p in "qkvo"}
    dense = f"{theirs}{mlp}.DenseReluDense."
    return {
        f"{name}.embedding.": f"{name}.embed_tokens.",
        f"{name}.relative_bias.": f"{name}.block.0.layer.0.SelfAttention.relative_attention_bias.",
        **self_attn,
        f"{ours}self_attn_input_norm.": f"{theirs}0.layer_norm.",
        f"{ours}mlp.up_proj.": f"{dense}wi.",
        f"{ours}mlp.down_proj.": f"{dense}wo.",
        f"{ours}gated_mlp.gate_proj.": f"{dense}wi_0.",
        f"{ours}gated_mlp.up_proj.": f"{dense}wi_1.",
        f"{ours}gated_mlp.down_proj.": f"{dense}wo.",
        f"{ours}mlp_input_norm.": f"{theirs}{mlp}.layer_norm.",
        f"{ours}gated_mlp_input_norm.": f"{theirs}{mlp}.layer_norm.",
    }


ARCH = Arch(
    model_types=("t5",),
    system="T5",
    adds="encoder and decoder graphs, cross-attention keys made once, relative buckets, unscaled scores",
    reference=causal_lm("T5ForConditionalGeneration"),
    build=build,
    names={
        "embedding.": "shared.",
        **_side("encoder", 1),
        **_side("decoder", 2),
        **{f"decoder.layers.{{i}}.cross_attn.{p}_proj.": f"{CROSS}EncDecAttention.{p}." for p in "qkvo"},
        "decoder.layers.{i}.cross_attn_input_norm.": f"{CROSS}layer_norm.",
        "encoder.norm.": "encoder.final_layer_norm.",
        "head.norm.": "decoder.final_layer_norm.",
        "head.projection.": "lm_head.",
    },
    # Whatever the config says, a head is tied where the checkpoint has none: transformers does the same.
    older={"lm_head.weight": "shared.weight"},
    base="decoder.",
    ignore=("decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight",),
    overflows_float16="T5 v1.1 and Flan-T5 overflow float16 in wo, which transformers keeps in float32",
    tiny={
        "vocab_size": 256,
        "d_model": 64,
        "d_kv": 24,
        "d_ff": 112,
        "num_layers": 3,
        "num_decoder_layers": 2,
        "num_heads": 4,
        "relative_attention_num_buckets": 12,
        "relative_attention_max_distance": 30,
        "layer_norm_epsilon": 1e-6,
        "feed_forward_proj": "relu",
        "is_encoder_decoder": True,
        "decoder_start_token_id": 0,
        "tie_word_embeddings": True,
    },
)
