"""Tiny random models of types that have no class in AnyQuant."""

from pathlib import Path
from typing import Any

import torch
import transformers

SMALL = {"vocab_size": 320, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("GPT2LMHeadModel", {"n_positions": 64, "bos_token_id": 0, "eos_token_id": 0}),
    "gpt_neox": ("GPTNeoXForCausalLM", {"intermediate_size": 48}),
    "opt": ("OPTForCausalLM", {"ffn_dim": 48, "word_embed_proj_dim": 16, "max_position_embeddings": 64}),
    "gemma2": (
        "Gemma2ForCausalLM",
        {"intermediate_size": 48, "num_key_value_heads": 2, "head_dim": 8, "sliding_window": 16},
    ),
    "olmo": ("OlmoForCausalLM", {"intermediate_size": 48, "clip_qkv": 0.5}),
    "stablelm": ("StableLmForCausalLM", {"intermediate_size": 48, "num_key_value_heads": 4, "use_qkv_bias": True}),
    "bert": ("BertForMaskedLM", {"intermediate_size": 48, "max_position_embeddings": 64}),
    "roberta": ("RobertaForMaskedLM", {"intermediate_size": 48, "max_position_embeddings": 80}),
    "distilbert": ("DistilBertForMaskedLM", {"dim": 32, "hidden_dim": 48, "n_layers": 3, "n_heads": 4}),
    "bloom": ("BloomForCausalLM", {"n_layer": 3, "n_head": 4}),
    "olmoe": ("OlmoeForCausalLM", {"intermediate_size": 16, "num_experts": 4, "num_experts_per_tok": 2}),
    "deepseek_v3": (
        "DeepseekV3ForCausalLM",
        {
            "intermediate_size": 48,
            "moe_intermediate_size": 16,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "n_group": 1,
            "topk_group": 1,
            "first_k_dense_replace": 1,
            "q_lora_rank": 16,
            "kv_lora_rank": 16,
            "qk_nope_head_dim": 8,
            "qk_rope_head_dim": 8,
            "v_head_dim": 8,
        },
    ),
    "gpt_oss": (
        "GptOssForCausalLM",
        {
            "intermediate_size": 16,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "num_key_value_heads": 2,
            "head_dim": 8,
            "sliding_window": 16,
        },
    ),
}


def make(folder: Path, model_type: str, **more: Any) -> Path:
    """A tiny random model with norms, biases and attention away from identity."""
    class_name, settings = MODELS[model_type]
    generator = torch.Generator().manual_seed(5)
    model = getattr(transformers, class_name)(
        transformers.CONFIG_MAPPING[model_type](**{**SMALL, "pad_token_id": 1, **settings, **more})
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            size = 0.3 if parameter.dim() == 1 else 1.5 / parameter.shape[-1] ** 0.5
            centre = 1.0 if parameter.dim() == 1 and name.endswith("weight") else 0.0
            parameter.copy_(centre + size * torch.randn(parameter.shape, generator=generator))
        for name, buffer in model.named_buffers():
            if name in model.state_dict():
                buffer.copy_(torch.randn(buffer.shape, generator=generator))
    model.save_pretrained(folder)
    return folder
