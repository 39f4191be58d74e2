"""The keys of config.json that no architecture needs to read: what each says, and where it says nothing."""

from __future__ import annotations

from types import MappingProxyType

# Keys that do not change what the exported graph computes, whatever they hold: training, generation, bookkeeping.
# fmt: off
ANY = frozenset(
    {
        "_attn_implementation", "_attn_implementation_autoset", "_attn_implementation_internal", "_commit_hash",
        "_flash_attn_2_enabled", "_from_model_config", "_name_or_path", "_num_labels", "activation_dropout",
        "architectures", "assistant_confidence_threshold", "attention_dropout", "attention_probs_dropout_prob",
        "attn_implementation", "attn_pdrop", "bad_words_ids", "base_model_ep_plan", "base_model_pp_plan",
        "base_model_tp_plan", "begin_suppress_tokens", "bos_token_id", "cache_implementation",
        "chunk_size_feed_forward", "classifier_dropout", "constraints", "decoder_start_token_id", "diversity_penalty",
        "do_sample", "dola_layers", "dropout", "dropout_rate", "dtype", "early_stopping", "embd_pdrop", "embed_dropout",
        "embedding_dropout", "encoder_no_repeat_ngram_size", "encoder_repetition_penalty", "eos_token_id",
        "epsilon_cutoff", "eta_cutoff", "exponential_decay_length_penalty", "finetuning_task", "force_words_ids",
        "forced_bos_token_id", "forced_eos_token_id", "gradient_checkpointing", "guidance_scale", "hidden_dropout",
        "hidden_dropout_prob", "id2label", "init_std", "initializer_factor", "initializer_range", "label2id",
        "layerdrop", "length_penalty", "low_memory", "max_length", "max_matching_ngram_size", "max_new_tokens",
        "max_sequence_length", "max_time", "min_length", "min_new_tokens", "min_p", "model_max_length", "model_type",
        "n_special", "name", "neftune_noise_alpha", "no_repeat_ngram_size", "num_assistant_tokens",
        "num_assistant_tokens_schedule", "num_beam_groups", "num_beams", "num_labels", "num_return_sequences",
        "output_attentions", "output_hidden_states", "output_logits", "output_past", "output_router_logits",
        "output_scores", "pad_token_id", "penalty_alpha", "predict_special_tokens", "prefix", "pretraining_tp",
        "problem_type", "prompt_lookup_num_tokens", "remove_invalid_values", "renormalize_logits", "repetition_penalty",
        "resid_dropout", "resid_pdrop", "residual_dropout", "return_dict", "return_dict_in_generate",
        "router_aux_loss_coef", "router_jitter_noise", "sep_token_id", "sequence_bias", "stop_strings",
        "summary_activation", "summary_first_dropout", "summary_proj_to_labels", "summary_type", "summary_use_proj",
        "suppress_tokens", "task_specific_params", "temperature", "tf_legacy_loss", "token_healing", "tokenizer_class",
        "tokenizer_model_max_length", "top_h", "top_k", "top_p", "torch_dtype", "torchscript", "transformers.js_config",
        "transformers_version", "typical_p", "use_bfloat16", "use_cache", "use_flash_attention",
        "use_flash_attention_2", "use_flash_attn", "watermarking_config",
    }
)
# The same in a causal decoder, whose family says that it is one and which has no table of positions.
CAUSAL = frozenset(
    {
        "add_cross_attention", "cross_attention_hidden_size", "is_decoder", "is_encoder_decoder",
        "max_position_embeddings", "tie_encoder_decoder",
    }
)
# fmt: on
# What a tool writes under names of its own, and the sizes of a pooler, which no exported head reads.
HARMLESS_STARTS = ("pooler_", "unsloth_")

# Features that an architecture which does not read the key does not have: the values at which it is not in use.
NEUTRAL = MappingProxyType(
    {
        "attention_bias": (False,),
        "attn_output_gate": (False,),
        "embedding_multiplier": (1,),
        "full_attn_mod": (1,),
        "interpolate_factor": (1,),
        "language_model_only": (False,),
        "lm_head_bias": (False,),
        "logit_scale": (1,),
        "logits_scaling": (1,),
        "mlp_bias": (False,),
        "mlp_only_layers": ([],),
        "num_experts": (0,),
        "num_local_experts": (0,),
        "partial_rotary_factor": (1,),
        "pruned_heads": ({},),
        "residual_multiplier": (1,),
        "rope_interleaved": (False,),
        "use_bias": (False,),
        "use_bidirectional_attention": (False,),
        "use_mrope": (False,),
        "use_qk_norm": (False,),
    }
)
# The same in a causal decoder alone, and in an encoder alone, which some of these would make a decoder.
NEUTRAL_CAUSAL = MappingProxyType({"is_causal": (True,)})
NEUTRAL_ENCODER = MappingProxyType(
    {
        "is_decoder": (False,),
        "add_cross_attention": (False,),
        "directionality": ("bidi",),
        "is_causal": (False, None),
        "is_encoder_decoder": (False,),
        "tie_encoder_decoder": (False,),
    }
)

# Keys that say again what another says.
EQUAL = MappingProxyType(
    {
        "hidden_size": "n_embd",
        "num_attention_heads": "n_head",
        "num_hidden_layers": "n_layer",
        "sliding_window_size": "sliding_window",
    }
)

# Keys whose null is not their absence: transformers takes a null is_causal for false.
NOT_NULL = frozenset({"is_causal"})

# Keys that say nothing while the switch is off that another key is.
SWITCHED = MappingProxyType({"sliding_window": "use_sliding_window", "max_window_layers": "use_sliding_window"})

# Where quantisation is spoken of; MLX writes the first twice, under both names.
QUANTISATION = ("quantization_config", "quantization", "compression_config")
