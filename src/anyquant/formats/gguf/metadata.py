"""The key-value metadata of a GGUF file: what llama.cpp must know of the model besides its tensors.

Keys: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. Nothing here depends on the clock or the host.
"""

import math
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from anyquant.core.checkpoint import Checkpoint
from anyquant.core.dtypes import Float32
from anyquant.core.errors import UnsupportedError
from anyquant.core.extras import require
from anyquant.core.plan import Plan
from anyquant.formats.certificate import KEY, STRING, UINT64, WIDTHS, kinds
from anyquant.formats.gguf.layouts import layout
from anyquant.formats.gguf.names import family_of
from anyquant.formats.gguf.presets import tables
from anyquant.models.architecture import Architecture
from anyquant.runtimes.kv_cache import KV_CACHE

# general.file_type of a file whose plan is no preset, by the type of most of its weights (llama_ftype in llama.h)
FILE_TYPES = {
    "F32": 0,
    "F16": 1,
    "Q4_0": 2,
    "Q4_1": 3,
    "Q8_0": 7,
    "Q5_0": 8,
    "Q5_1": 9,
    "Q2_K": 10,
    "Q3_K": 12,
    "Q4_K": 15,
    "Q5_K": 17,
    "Q6_K": 18,
    "IQ3_XXS": 23,
    "IQ4_NL": 25,
    "IQ3_S": 26,
    "IQ2_S": 28,
    "IQ4_XS": 30,
    "BF16": 32,
}
GUESSED = 1024
# read by llama.cpp for two other families only
YARN_FIXED = {"beta_fast": 32, "beta_slow": 1, "truncate": True}
# llama.cpp looks for these in general.name and then demands special tokens that byte-level vocabularies have not
NAMES_WITH_A_MEANING = ("phi-3", "phi3", "modern-bert")


def add_certificate(writer: Any) -> None:
    """Room for the verdict, filled with blanks; before all other keys (see formats.certificate)."""
    for name, kind in kinds():
        if kind == STRING:
            writer.add_string(KEY + name, " " * WIDTHS[name])
        elif kind == UINT64:
            writer.add_uint64(KEY + name, 0)
        else:
            writer.add_float64(KEY + name, 0.0)


def add_metadata(writer: Any, architecture: Architecture, plan: Plan, checkpoint: Checkpoint) -> None:
    """Add everything but the tokenizer to a `gguf.GGUFWriter`.

    llama.cpp attends to all earlier tokens in these families, so a model with a sliding window is described with the
    window as its context: within it the two computations are the same. The types of the key-value cache that the file
    was planned for are told to llama.cpp by flags; the key is for those who judge or run the file later.
    """
    sizes = architecture.dimensions
    writer.add_name(display_name(checkpoint))
    writer.add_file_type(file_type(architecture, plan))
    writer.add_quantization_version(require("gguf").GGML_QUANT_VERSION)
    writer.add_context_length(min(sizes.context, sizes.window or sizes.context))
    writer.add_embedding_length(sizes.hidden)
    writer.add_block_count(sizes.blocks)
    writer.add_feed_forward_length(sizes.intermediate)
    writer.add_head_count(sizes.heads)
    writer.add_head_count_kv(sizes.kv_heads)
    writer.add_key_length(sizes.head_dim)
    writer.add_value_length(sizes.head_dim)
    writer.add_layer_norm_rms_eps(sizes.norm_epsilon)
    writer.add_vocab_size(sizes.vocabulary)
    writer.add_rope_dimension_count(sizes.rope_dim)
    writer.add_rope_freq_base(sizes.rope_theta)
    _add_scaling(writer, architecture)
    if plan.kv_cache is not None:
        writer.add_string(KV_CACHE, plan.kv_cache)


def display_name(checkpoint: Checkpoint) -> str:
    """What llama.cpp and its front ends call the model; "" (no such key) for a name that changes how they tokenize."""
    declared = checkpoint.config.get("_name_or_path")
    path = declared if isinstance(declared, str) and declared.strip("/") else checkpoint.location
    name = Path(path).name.encode(errors="replace").decode()  # a folder's name need not be Unicode, a key's value must
    return "" if any(word in name.lower() for word in NAMES_WITH_A_MEANING) else name


def file_type(architecture: Architecture, plan: Plan) -> int:
    """llama.cpp's number for the mixture: the preset's own, else that of the type most block weights have."""
    preset = tables().presets.get(plan.label.upper())
    if preset is not None:
        return preset.file_type
    weights: Counter[str] = Counter()
    for linear in architecture.linears:
        if linear.block is not None:
            kind = layout(plan.decisions[linear.name].grid).ggml_type
            weights[kind] += linear.weights
    return FILE_TYPES.get(weights.most_common(1)[0][0], GUESSED) if weights else GUESSED


def refuse_scaling(architecture: Architecture) -> list[str]:
    """Why the rotary scaling of the model cannot be described in GGUF (empty when it can)."""
    sizes, scaling = architecture.dimensions, architecture.dimensions.rope_scaling
    if not scaling:
        return []
    kind = scaling["rope_type"]
    if kind not in family_of(architecture).scalings:
        return [f"rotary scaling {kind!r} of {architecture.family} is not written to GGUF"]
    reasons = [
        f"{key} = {scaling[key]} of the rotary scaling: llama.cpp always uses {usual} for {architecture.family}"
        for key, usual in YARN_FIXED.items()
        if kind == "yarn" and scaling.get(key, usual) != usual
    ]
    if kind == "longrope" and scaling["original_max_position_embeddings"] > sizes.context:
        reasons.append("longrope with an original context above the model's own is not written to GGUF")
    return reasons


def _add_scaling(writer: Any, architecture: Architecture) -> None:
    sizes, scaling = architecture.dimensions, architecture.dimensions.rope_scaling
    kind = scaling.get("rope_type", "default")
    types = require("gguf").RopeScalingType
    if kind == "linear":
        writer.add_rope_scaling_type(types.LINEAR)
        writer.add_rope_scaling_factor(float(scaling["factor"]))
    elif kind == "yarn":
        factor = float(scaling["factor"])
        writer.add_rope_scaling_type(types.YARN)
        writer.add_rope_scaling_factor(factor)
        writer.add_rope_scaling_orig_ctx_len(int(scaling["original_max_position_embeddings"]))
        # llama.cpp multiplies its own factor, that of the paper, with the one in the file
        writer.add_rope_scaling_attn_factors(yarn_attention(scaling) / paper_attention(factor))
    elif kind == "longrope":
        writer.add_rope_scaling_type(types.LONGROPE)
        original = int(scaling["original_max_position_embeddings"])
        writer.add_rope_scaling_orig_ctx_len(original)
        writer.add_rope_scaling_attn_factors(longrope_attention(scaling, sizes.context, original))


def paper_attention(factor: float, mscale: float = 1.0) -> float:
    """What YaRN multiplies queries and keys with (Peng et al. 2023, section 3.4)."""
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0


def yarn_attention(scaling: Mapping[str, Any]) -> float:
    """The same for a config that may say otherwise (transformers.modeling_rope_utils)."""
    if "attention_factor" in scaling:
        return float(scaling["attention_factor"])
    factor, mscale, everywhere = float(scaling["factor"]), scaling.get("mscale"), scaling.get("mscale_all_dim")
    if mscale and everywhere:
        return paper_attention(factor, float(mscale)) / paper_attention(factor, float(everywhere))
    return paper_attention(factor)


def longrope_attention(scaling: Mapping[str, Any], context: int, original: int) -> float:
    """The attention factor of LongRoPE (transformers.modeling_rope_utils)."""
    if "attention_factor" in scaling:
        return float(scaling["attention_factor"])
    factor = float(scaling.get("factor", context / original))
    return math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0


def constants(architecture: Architecture) -> list[tuple[str, Float32]]:
    """Tensors that follow from the config alone: divisors of the rotary frequencies, by GGUF tensor name."""
    scaling = architecture.dimensions.rope_scaling
    kind = scaling.get("rope_type", "default")
    if kind == "llama3":
        return [("rope_freqs.weight", llama3_divisors(architecture))]
    if kind == "longrope":
        return [
            (f"rope_factors_{reach}.weight", np.asarray(scaling[f"{reach}_factor"], dtype=np.float32))
            for reach in ("long", "short")
        ]
    return []


CONSTANTS = frozenset({"rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight"})


def llama3_divisors(architecture: Architecture) -> Float32:
    """By what Llama 3.1 divides each rotary frequency, shape (rope_dim / 2,).

    Wavelengths above original / low_freq_factor are divided by `factor`, those below original / high_freq_factor by 1,
    and between them the *frequency* is interpolated linearly in original / wavelength (transformers'
    `_compute_llama3_parameters`).
    """
    sizes, scaling = architecture.dimensions, architecture.dimensions.rope_scaling
    factor, low, high = (float(scaling[key]) for key in ("factor", "low_freq_factor", "high_freq_factor"))
    original = float(scaling["original_max_position_embeddings"])
    exponents = np.arange(0, sizes.rope_dim, 2, dtype=np.float64) / sizes.rope_dim
    wavelengths = 2 * math.pi * sizes.rope_theta**exponents
    if high == low:
        raise UnsupportedError("rotary scaling llama3 with equal low_freq_factor and high_freq_factor is undefined")
    smooth = np.clip((original / wavelengths - low) / (high - low), 0.0, 1.0)
    return (1.0 / ((1.0 - smooth) / factor + smooth)).astype(np.float32)
