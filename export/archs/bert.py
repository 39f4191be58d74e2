"""BERT (transformers modeling_bert.py): an encoder that norms the sums, and its head for masked tokens."""

from llmexport.export.config import Config
from llmexport.export.encoder import OLDER, TINY, names, post_norm
from llmexport.export.spec import Arch, Model, Reference


def build(config: Config) -> Model:
    config.expect("position_embedding_type", "absolute")
    return post_norm(config)


ARCH = Arch(
    model_types=("bert",),
    system="BERT",
    adds="encoder: no cache, norms on sums, learned positions, token types, padding anywhere",
    reference=Reference("BertForMaskedLM", {"logits": "logits"}),
    build=build,
    names={
        **names("bert."),
        "head.transform.": "cls.predictions.transform.dense.",
        "head.norm.": "cls.predictions.transform.LayerNorm.",
        "head.projection.": "cls.predictions.decoder.",
        "head.bias": "cls.predictions.bias",
    },
    base="bert.",
    older=OLDER,
    ignore=("bert.embeddings.position_ids", "bert.pooler.dense.*", "cls.predictions.bias", "cls.seq_relationship.*"),
    tiny={**TINY, "tie_word_embeddings": True, "pad_token_id": 0},
)
