"""Small, complete Hugging Face folders of every family, with weights that make a wrong conversion visible.

Attention scores and output distributions are peaked, norms and biases are away from identity, rope theta is not the
default: a dropped permutation, norm or bias changes the output. `measure_peakedness` proves it.
"""

import json
import math
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from support.tokenizers import MARK_TEXTS, PROBE_TEXTS, STYLES, write_tokenizer

__all__ = ["FAMILIES", "MARK_TEXTS", "PROBE_TEXTS", "STYLES", "make_checkpoint", "measure_peakedness"]

DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True)
class Family:
    """`config` are the settings of the family's config class that differ from COMMON.

    `padded`: the model's vocabulary is larger than the tokenizer's, as in the published models.
    """

    config_class: str
    tokenizer: str
    config: Mapping[str, Any] = field(default_factory=dict)
    padded: bool = False


COMMON = {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 512, "max_position_embeddings": 512}
MOE = {"num_experts_per_tok": 2, "num_local_experts": 4}
FAMILIES = {
    "llama": Family("LlamaConfig", "llama-3", {"rms_norm_eps": 1e-5}),
    "mistral": Family("MistralConfig", "tekken", {"head_dim": 32, "sliding_window": None, "rms_norm_eps": 1e-5}),
    "qwen2": Family("Qwen2Config", "qwen2", padded=True),
    "qwen3": Family("Qwen3Config", "qwen2", {"head_dim": 128}, padded=True),
    "phi3": Family("Phi3Config", "phi-4", {"original_max_position_embeddings": 512, "pad_token_id": None}, padded=True),
    "mixtral": Family("MixtralConfig", "llama-3", MOE),
    "qwen2_moe": Family(
        "Qwen2MoeConfig",
        "qwen2",
        {
            "num_experts_per_tok": 2,
            "num_experts": 4,
            "moe_intermediate_size": 256,
            "shared_expert_intermediate_size": 768,
            "mlp_only_layers": [0],
        },
        padded=True,
    ),
    "qwen3_moe": Family(
        "Qwen3MoeConfig",
        "qwen2",
        {"num_experts_per_tok": 2, "num_experts": 4, "moe_intermediate_size": 256, "head_dim": 64},
        padded=True,
    ),
}

# Standard deviation of a projection's output for an input of unit variance.
GAINS = {
    "q_proj": 1.9,
    "k_proj": 1.9,
    "v_proj": 1.0,
    "o_proj": 1.0,
    "gate_proj": 1.5,
    "up_proj": 1.0,
    "down_proj": 1.5,
    "gate_up_proj": 1.2,
    "gate": 1.5,
    "shared_expert_gate": 1.0,
    "lm_head": 2.8,
    "embed_tokens": 1.0,
}


def make_checkpoint(
    folder: Path,
    family: str = "llama",
    *,
    dtype: str = "F32",
    tied: bool = False,
    seed: int = 0,
    blocks: int = 2,
    hidden: int = 256,
    tokenizer: str | None = None,
    shard_bytes: int | None = None,
    stacked: bool = False,
    config: Mapping[str, Any] | None = None,
) -> Path:
    """Write a model of `family` (FAMILIES) into the new folder `folder` and return it.

    `config` overrides settings of the config class (num_attention_heads, head_dim, rope_parameters, attention_bias,
    vocab_size ...), `tokenizer` names a style of STYLES, `shard_bytes` splits the weights over several files.
    `stacked` stores the experts as the 3-D tensors of transformers 5, not one by one as published.
    """
    known = FAMILIES[family]
    folder.mkdir(parents=True)
    style = STYLES[tokenizer or known.tokenizer]
    trained = write_tokenizer(folder, tokenizer or known.tokenizer)
    vocabulary = trained.get_vocab_size()
    settings: dict[str, Any] = {
        "vocab_size": math.ceil(vocabulary / 64) * 64 if known.padded else vocabulary,
        "hidden_size": hidden,
        "num_hidden_layers": blocks,
        "tie_word_embeddings": tied,
        "rope_parameters": {"rope_type": "default", "rope_theta": 3000.0},
        "bos_token_id": trained.token_to_id(style.bos) if style.bos else None,
        "eos_token_id": trained.token_to_id(style.eos),
        "dtype": DTYPES[dtype],
    }
    settings |= COMMON | dict(known.config) | dict(config or {})
    model_config = getattr(transformers, known.config_class)(**settings)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(model_config)
    weights = {name: _draw(name, tuple(value.shape), seed, tied, settings) for name, value in model.named_parameters()}
    state = {name: torch.from_numpy(value).to(DTYPES[dtype]) for name, value in weights.items()}
    if tied:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    model.load_state_dict(state, assign=True, strict=True)
    model.tie_weights()
    model.save_pretrained(folder, max_shard_size=shard_bytes or "1GB", save_original_format=not stacked)
    return folder


def _draw(name: str, shape: tuple[int, ...], seed: int, tied: bool, settings: Mapping[str, Any]) -> Any:
    """Values of one parameter, float32. Each has its own stream, so that a family's variants share what they can."""
    rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
    parts = name.split(".")
    module = parts[-2] if parts[-1] in ("weight", "bias") else parts[-1]
    if parts[-1] == "bias":
        return (0.5 * rng.standard_normal(shape)).astype(np.float32)
    if len(shape) == 1:
        # q/k norms alone set the size of the attention scores, so theirs must be larger
        stretch = 1.75 if module in ("q_norm", "k_norm") else 1.0
        return (stretch * rng.uniform(0.5, 1.5, shape)).astype(np.float32)
    values = rng.standard_normal(shape, dtype=np.float32)
    if module == "embed_tokens":
        return values * np.float32(GAINS["lm_head"] / math.sqrt(shape[-1])) if tied else values
    if module == "qkv_proj":
        scored = settings["hidden_size"] * (1 + settings["num_key_value_heads"] / settings["num_attention_heads"])
        values[: int(scored)] *= np.float32(GAINS["q_proj"])
        return values / np.float32(math.sqrt(shape[-1]))
    return values * np.float32(GAINS[module] / math.sqrt(shape[-1]))


def measure_peakedness(folder: Path) -> tuple[float, float]:
    """(smallest standard deviation of attention scores over layers and heads, mean output entropy / ln V).

    On random tokens, in float32. The softmax hides a constant per query, so scores are centred per query: this is the
    spread that attention really sees. Queries with fewer than 16 keys are left out.
    """
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    size = json.loads((folder / "config.json").read_text())["vocab_size"]
    tokens = torch.from_numpy(np.random.default_rng(7).integers(0, size, (2, 64)))
    with torch.inference_mode():
        output = model(tokens, output_attentions=True)
    smallest = math.inf
    for attention in output.attentions:
        scores = attention.clamp_min(1e-38).log()
        rows = [scores[:, :, query, : query + 1] for query in range(16, 64)]
        centred = torch.cat([row - row.mean(-1, keepdim=True) for row in rows], -1)
        smallest = min(smallest, float(centred.square().mean((0, 2)).sqrt().min()))
    log_p = output.logits.log_softmax(-1)
    entropy = float(-(log_p.exp() * log_p).sum(-1).mean())
    return smallest, entropy / math.log(size)
