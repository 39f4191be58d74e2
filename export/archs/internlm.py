"""InternLM 7B and 20B (internlm's modeling_internlm.py): Llama, with biases on q, k, v and o in 7B."""

from llmexport.export.config import Config
from llmexport.export.decoder import BUFFERS, NAMES, TINY, decoder
from llmexport.export.errors import ExportError
from llmexport.export.rope import within
from llmexport.export.spec import Arch, Mask, Model, Rotary, causal_lm, decoder_layer
from llmexport.export.values import as_positive, show

CODE = {
    "AutoConfig": "configuration_internlm.InternLMConfig",
    "AutoModel": "modeling_internlm.InternLMForCausalLM",
    "AutoModelForCausalLM": "modeling_internlm.InternLMForCausalLM",
}


def turning(config: Config, head_size: int) -> Rotary:
    """RoPE in the words of `rotary`: its base, and what longer texts than the trained ones do to it."""
    found = config.get("rotary", {"base": 10000, "type": "dynamic"})
    known = isinstance(found, dict) and {*found} <= {"base", "type", "scaling_factor"}
    if not known or found.get("type", "dynamic") not in ("origin", "dynamic"):
        raise ExportError(f"config.json: rotary is {show(found)}, expected a base and a type, origin or dynamic")
    stretched = found.get("type", "dynamic") == "dynamic"
    places = within(config, "rotary", "max_position_embeddings") if stretched else None
    return Rotary(head_size, as_positive("rotary's base", found.get("base", 10000)), places=places)


def build(config: Config) -> Model:
    config.expect_code(CODE)
    bias = config.flag("bias", True)
    d = decoder(config, grouped=False)
    norm = d.norm()
    layer = decoder_layer(norm, d.attention(qkv_bias=bias, out_bias=bias), norm, d.mlp())
    return d.model([(layer, (turning(config, d.head_size), Mask()))] * d.layers, norm, tied=False)


ARCH = Arch(
    model_types=("internlm",),
    system="InternLM",
    adds="bias on q, k, v, o",
    reference=causal_lm("InternLMForCausalLM", made_by="internlm"),
    build=build,
    names=NAMES,
    ignore=BUFFERS,
    tiny={
        **{k: v for k, v in TINY.items() if k not in ("num_key_value_heads", "rope_parameters")},
        "bias": True,
        "rotary": {"base": 20000, "type": "dynamic"},
    },
)
