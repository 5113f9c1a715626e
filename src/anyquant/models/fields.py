"""Fields of config.json: which are read, which may be ignored, and which must have the value that changes nothing."""

from collections.abc import Mapping
from typing import Any

# Read by models.config and models.rope, for every family.
READ = frozenset(
    {
        "model_type",
        "architectures",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
        "vocab_size",
        "max_position_embeddings",
        "rms_norm_eps",
        "rope_theta",
        "rope_scaling",
        "rope_parameters",
        "partial_rotary_factor",
        "original_max_position_embeddings",
        "tie_word_embeddings",
        "hidden_act",
        "quantization_config",
        "compression_config",
    }
)

# Training, generation, bookkeeping: nothing that a forward pass in evaluation mode depends on. `dtype` is what the file
# headers say better; `pretraining_tp` splits products without changing them; `auto_map` names remote code, never run;
# `dual_chunk_attention_config` (Qwen2.5-1M) is an option of one server, which the model's own code does not have.
_NOTES = """
dtype torch_dtype transformers_version use_cache initializer_range attention_dropout hidden_dropout resid_pdrop
embd_pdrop output_router_logits router_aux_loss_coef router_jitter_noise pretraining_tp auto_map id2label label2id
bos_token_id eos_token_id pad_token_id unk_token_id sep_token_id cls_token_id decoder_start_token_id
forced_bos_token_id forced_eos_token_id bad_words_ids suppress_tokens begin_suppress_tokens
max_length min_length do_sample num_beams temperature top_k top_p typical_p
repetition_penalty length_penalty no_repeat_ngram_size encoder_no_repeat_ngram_size early_stopping
num_beam_groups diversity_penalty num_return_sequences exponential_decay_length_penalty prefix prefix_token_id
output_attentions output_hidden_states output_scores return_dict return_dict_in_generate remove_invalid_values
task_specific_params tokenizer_class finetuning_task problem_type pruned_heads is_decoder is_encoder_decoder
tie_encoder_decoder tf_legacy_loss use_bfloat16 torchscript chunk_size_feed_forward
max_sequence_length model_max_length is_llama_config gradient_checkpointing use_flash_attn flash_attn
dual_chunk_attention_config
transformers.js_config
"""
HARMLESS = frozenset(_NOTES.split())

# Fields whose other values change the computation in a way that AnyQuant does not know.
NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "hidden_act": ("silu", "swish"),
    "activation": ("swiglu", "silu"),
    "rope_interleaved": (False,),
    "logit_scale": (1.0, 1),
    "logits_scaling": (1.0, 1),
    "embedding_multiplier": (1.0, 1),
    "residual_multiplier": (1.0, 1),
    "full_attn_mod": (1,),
    "interpolate_factor": (1,),
    "num_nextn_predict_layers": (0,),
}


def is_note(field: str) -> bool:
    """Private attributes and the marks that training tools leave."""
    return field.startswith(("_", "unsloth"))


def shown(value: Any) -> str:
    """A value of a config for an error message: never more than a line."""
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
