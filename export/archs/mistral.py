"""Mistral 7B (transformers modeling_mistral.py): every layer looks back over one sliding window."""

from llmexport.export.config import Config
from llmexport.export.decoder import BUFFERS, NAMES, TINY, decoder
from llmexport.export.spec import Arch, Mask, Model, Multimodal, causal_lm, decoder_layer


def build(config: Config) -> Model:
    d = decoder(config)
    norm = d.norm()
    layer = decoder_layer(norm, d.attention(), norm, d.mlp())
    reads = (config.rotary(d.head_size), Mask(config.window("sliding_window", absent=4096)))
    return d.model([(layer, reads)] * d.layers, norm, tied=False)


ARCH = Arch(
    model_types=("mistral",),
    system="Mistral",
    adds="sliding window",
    reference=causal_lm("MistralForCausalLM"),
    build=build,
    names=NAMES,
    ignore=BUFFERS,
    multimodal=(
        Multimodal(
            model_type="mistral3",
            architecture="Mistral3ForConditionalGeneration",
            names={"model.": "language_model.model.", "lm_head.": "language_model.lm_head."},
            other_names=({"model.": "model.language_model."},),
            left_out=("vision_tower.*", "multi_modal_projector.*"),
            ignore=("model.vision_tower.*", "model.multi_modal_projector.*"),
            harmless=(
                "image_token_index",
                "multimodal_projector_bias",
                "projector_hidden_act",
                "spatial_merge_size",
                # transformers writes true, the default of its class, beside models that have a head of their own.
                "tie_word_embeddings",
                "vision_config",
                "vision_feature_layer",
            ),
        ),
    ),
    tiny={**TINY, "head_dim": 32, "sliding_window": 8},
)
