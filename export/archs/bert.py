"""BERT (transformers modeling_bert.py): an encoder that norms the sums, and its head for masked tokens."""

from llmexport.export.config import Config
from llmexport.export.encoder import post_norm
from llmexport.export.spec import Arch, Model, Reference

LAYER = "bert.encoder.layer.{i}."


def build(config: Config) -> Model:
    config.expect("position_embedding_type", "absolute")
    return post_norm(config)


ARCH = Arch(
    model_types=("bert",),
    reference=Reference("BertForMaskedLM", {"logits": "logits"}),
    build=build,
    names={
        "embedding.": "bert.embeddings.word_embeddings.",
        "embedding.types.": "bert.embeddings.token_type_embeddings.",
        "embedding.positions.": "bert.embeddings.position_embeddings.",
        "embedding.norm.": "bert.embeddings.LayerNorm.",
        "layers.{i}.self_attn.q_proj.": f"{LAYER}attention.self.query.",
        "layers.{i}.self_attn.k_proj.": f"{LAYER}attention.self.key.",
        "layers.{i}.self_attn.v_proj.": f"{LAYER}attention.self.value.",
        "layers.{i}.self_attn.o_proj.": f"{LAYER}attention.output.dense.",
        "layers.{i}.self_attn_sum_norm.": f"{LAYER}attention.output.LayerNorm.",
        "layers.{i}.mlp.up_proj.": f"{LAYER}intermediate.dense.",
        "layers.{i}.mlp.down_proj.": f"{LAYER}output.dense.",
        "layers.{i}.mlp_sum_norm.": f"{LAYER}output.LayerNorm.",
        "head.transform.": "cls.predictions.transform.dense.",
        "head.norm.": "cls.predictions.transform.LayerNorm.",
        "head.projection.": "cls.predictions.decoder.",
        "head.bias": "cls.predictions.bias",
    },
    base="bert.",
    older={"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"},
    ignore=("bert.embeddings.position_ids", "bert.pooler.dense.*", "cls.predictions.bias", "cls.seq_relationship.*"),
    tiny={
        "vocab_size": 256,
        "hidden_size": 64,
        "intermediate_size": 112,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-12,
        "max_position_embeddings": 320,
        "type_vocab_size": 3,
        "tie_word_embeddings": True,
        "pad_token_id": 0,
    },
)
