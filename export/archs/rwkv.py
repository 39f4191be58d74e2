"""RWKV-4 (transformers modeling_rwkv.py): no attention, but a decaying mean of all values, carried in five states."""

from llmexport.export.config import Config
from llmexport.export.errors import ExportError
from llmexport.export.spec import (
    Arch,
    ChannelMix,
    Embedding,
    Head,
    Layer,
    Model,
    Norm,
    Presence,
    Reference,
    Sublayer,
    TimeMix,
)
from llmexport.export.stack import wired


def build(config: Config) -> Model:
    hidden, layers = config.length("hidden_size"), config.count("num_hidden_layers")
    vocabulary, intermediate = config.length("vocab_size"), _width(config, "intermediate_size", 4 * hidden)
    if (attention := _width(config, "attention_hidden_size", hidden)) != hidden:
        # transformers carries states of the hidden size alone.
        raise ExportError(
            f"config.json: attention_hidden_size is {attention}, only hidden_size, {hidden}, is supported"
        )
    # No more than the tokens of one call of a kernel of transformers.
    config.integer("context_length", 1024)
    norm = Norm(hidden, config.number("layer_norm_epsilon", 1e-5), statistics="layer", bias=True)
    # Hidden states are halved behind every so many layers, and what is added to them is made so much smaller.
    every = _rescaled(config)

    def layer(i: int) -> Layer:
        scale = 0.5 ** (i // every) if every else 1.0
        halved = 0.5 if every and (i + 1) % every == 0 else 1.0
        time, channel = TimeMix(hidden, scale), ChannelMix(hidden, intermediate, scale)
        second = Sublayer("feed_forward", channel, norm, scale=halved, kept=halved)
        return Layer((Sublayer("attention", time, norm), second))

    embedding = Embedding(vocabulary, hidden, norm=norm)
    # The last norm has the epsilon of its class, whatever the config says of the others.
    head = Head(Norm(hidden, 1e-5, statistics="layer", bias=True), vocabulary)
    tied = config.flag("tie_word_embeddings")
    return wired(embedding, [(layer(i), (Presence(),)) for i in range(layers)], head, tied=tied, static=config.static)


def _width(config: Config, key: str, absent: int) -> int:
    """The size that a key says; null says what no key says."""
    return absent if config.get(key, None) is None else config.length(key)


def _rescaled(config: Config) -> int:
    """After how many layers each hidden states are halved; 0: never."""
    return max(0, config.integer("rescale_every", 6, least=-(2**31)))


ARCH = Arch(
    model_types=("rwkv",),
    system="RWKV (ChatRWKV)",
    adds="no attention: a decaying mean of values with a running maximum; shifted tokens; five states",
    reference=Reference("RwkvForCausalLM", {"logits": "logits"}, state="state"),
    build=build,
    names={
        "embedding.": "rwkv.embeddings.",
        "embedding.norm.": "rwkv.blocks.0.pre_ln.",
        "layers.{i}.": "rwkv.blocks.{i}.",
        "layers.{i}.attention_input_norm.": "rwkv.blocks.{i}.ln1.",
        "layers.{i}.feed_forward_input_norm.": "rwkv.blocks.{i}.ln2.",
        "head.norm.": "rwkv.ln_out.",
        "head.projection.": "head.",
    },
    base="rwkv.",
    tiny={
        "vocab_size": 256,
        "hidden_size": 64,
        "intermediate_size": 96,
        "attention_hidden_size": 64,
        "num_hidden_layers": 2,
        "context_length": 512,
        "rescale_every": 1,
        "layer_norm_epsilon": 1e-3,
        "tie_word_embeddings": False,
    },
)
