"""Falcon 7B, 40B, 180B, 2 and RW (transformers modeling_falcon.py): attention and MLP side by side; RW has ALiBi."""

from llmexport.export.archs.bloom import LAYER, NAMES
from llmexport.export.config import Config
from llmexport.export.decoder import PLAIN, head_size
from llmexport.export.errors import ExportError
from llmexport.export.spec import (
    Alibi,
    Arch,
    Attention,
    Block,
    Embedding,
    Head,
    Layer,
    Mask,
    Mlp,
    Model,
    Norm,
    Sublayer,
    causal_lm,
)
from llmexport.export.stack import wired

HEADS = ("", "ForCausalLM", "ForQuestionAnswering", "ForSequenceClassification", "ForTokenClassification")
# TII's code, which transformers took over.
CODE = {"AutoConfig": "configuration_falcon.FalconConfig"} | {
    f"AutoModel{head}": f"modeling_falcon.Falcon{head or 'Model'}" for head in HEADS
}
# What it was called when the first checkpoints were published, by a model_type that told the two layers apart.
FIRST = {"AutoConfig": "configuration_RW.RWConfig"} | {
    f"AutoModel{head}": f"modelling_RW.RW{head or 'Model'}" for head in HEADS
}


def build(config: Config) -> Model:
    config.expect_code(FIRST if config.get("architectures", None) == ["RWForCausalLM"] else CODE)
    config.expect("apply_residual_connection_post_layernorm", False)
    new = config.flag("new_decoder_architecture", config.get("model_type", "falcon") == "RefinedWeb")
    hidden = config.length(config.either("hidden_size", "n_embed"))
    heads = config.count(config.either("num_attention_heads", "n_head"))
    layers = config.count(config.either("num_hidden_layers", "n_layer"))
    vocabulary = config.length("vocab_size")
    size, bias = head_size(hidden, heads), config.flag("bias")
    rotary, reads = config.rotary(size), tuple[Block, ...]()
    if alibi := config.flag("alibi"):
        reads = (Mask(), Alibi(heads, size**-0.5, rounded=True))
    attention = Attention(
        hidden,
        heads,
        kv_heads(config, heads, new),
        size,
        qkv_bias=bias,
        out_bias=bias,
        fused=True,
        grouped=True,
        rotated=0 if alibi else None,
        biased=alibi,
    )
    intermediate = config.get("ffn_hidden_size", None)
    wide = 4 * hidden if intermediate is None else config.length("ffn_hidden_size")
    config.expect("ff_factor", wide / hidden, None)
    mlp = Mlp(hidden, wide, config.choice("activation", PLAIN, "gelu"), bias=bias, gated=False)
    norm = Norm(hidden, config.number("layer_norm_epsilon", 1e-5), statistics="layer", bias=True)
    layer = Layer(*sublayers(config, norm, attention, mlp, new))
    return wired(
        Embedding(vocabulary, hidden),
        [(layer, reads or (rotary, Mask()))] * layers,
        Head(norm, vocabulary),
        tied=config.flag("tie_word_embeddings", True),
        static=config.static,
    )


def kv_heads(config: Config, heads: int, new: bool) -> int:
    """How many keys and values a token has; transformers repeats those of the new layers before it caches them."""
    key, one = config.either("num_kv_heads", "n_head_kv"), config.flag("multi_query", True)
    found = config.count(key) if config.has(key) else heads
    if new:
        return found
    if not one and found != heads:
        raise ExportError(
            f"config.json: num_kv_heads is {found}, without multi_query each of {heads} heads has its own"
        )
    return 1 if one else heads


def sublayers(
    config: Config, norm: Norm, attention: Attention, mlp: Mlp, new: bool
) -> tuple[tuple[Sublayer, ...], bool]:
    """Attention and MLP, and whether both read the layer's input: through one norm, or each through its own."""
    parallel = config.flag("parallel_attn", True)
    norms = config.get("num_ln_in_parallel_attn", None)
    norms = 1 + new if norms is None else config.count("num_ln_in_parallel_attn")
    if norms > 1 + new or (new and not parallel):
        raise ExportError(
            f"config.json: num_ln_in_parallel_attn is {norms} and parallel_attn {str(parallel).lower()}, "
            f"which no model with new_decoder_architecture {str(new).lower()} has"
        )
    if not parallel:
        return (Sublayer("self_attn", attention, norm), Sublayer("mlp", mlp, norm)), False
    if norms == 1:
        return (Sublayer("self_attn", attention, norm), Sublayer("mlp", mlp)), True
    # Checkpoints have other names for these norms.
    return (Sublayer("attn", attention, norm), Sublayer("ffn", mlp, norm)), True


ARCH = Arch(
    model_types=("falcon", "RefinedWeb", "RefinedWebModel"),
    system="Falcon 7B, 40B, RW",
    adds="grouped fused q, k, v; attention and MLP side by side with one norm or two; or ALiBi in bfloat16",
    # Its eager attention adds ALiBi twice: once to the logits, and once with the mask.
    reference=causal_lm("FalconForCausalLM", attention="sdpa", aliases=("RWForCausalLM",)),
    build=build,
    names={
        **NAMES,
        **{path.replace("self_attn", "attn").replace("mlp", "ffn"): name for path, name in NAMES.items()},
        "layers.{i}.attn_input_norm.": f"{LAYER}ln_attn.",
        "layers.{i}.ffn_input_norm.": f"{LAYER}ln_mlp.",
    },
    base="transformer.",
    tiny={
        "vocab_size": 256,
        "hidden_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 6,
        "num_kv_heads": None,
        "ffn_hidden_size": 112,
        "alibi": False,
        "bias": False,
        "multi_query": True,
        "new_decoder_architecture": False,
        "parallel_attn": True,
        "layer_norm_epsilon": 1e-5,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "tie_word_embeddings": True,
    },
)
