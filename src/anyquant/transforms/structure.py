"""What transforms must know of a family: how its norms multiply, and where they stand.

A family that is not listed is refused: a norm that adds an offset to its gain (Gemma: 1 + g), subtracts the mean
(LayerNorm) or stands behind the block (OLMo 2) looks the same in the names of its tensors.
"""

from collections.abc import Sequence

from anyquant.core.linear import Carried, Linear, Role
from anyquant.models.architecture import Architecture

# RMSNorm whose output is gain * x / rms(x), before attention and feed-forward, on a residual stream that nothing else
# reads, writes or scales
PLAIN = frozenset({"llama", "mistral", "qwen2", "qwen3", "phi3", "mixtral", "qwen2_moe", "qwen3_moe"})
# model type -> what is different
DIFFERENT = {
    **dict.fromkeys(("gemma",), "its norms multiply by 1 + gain"),
    **dict.fromkeys(("gemma2", "gemma3", "gemma3_text"), "it normalises the output of each part (post-norm)"),
    **dict.fromkeys(("olmo2", "olmo3", "exaone4"), "it normalises the output of each part (post-norm)"),
    **dict.fromkeys(("phi", "gpt2", "gpt_neox", "opt", "bloom", "falcon", "stablelm"), "its norms are LayerNorms"),
    **dict.fromkeys(("bert", "roberta"), "its norms are LayerNorms behind the residual sum (post-norm)"),
    **dict.fromkeys(("cohere", "cohere2"), "its norms are LayerNorms"),
}

HIDDEN_READERS = frozenset({Role.ATTN_Q, Role.ATTN_K, Role.ATTN_V, Role.FFN_GATE, Role.FFN_UP, Role.ROUTER})
HIDDEN_WRITERS = frozenset({Role.ATTN_OUTPUT, Role.FFN_DOWN})
_ATTENTION_INPUT = frozenset({Role.ATTN_Q, Role.ATTN_K, Role.ATTN_V})
_FFN_INPUT = frozenset({Role.FFN_GATE, Role.FFN_UP, Role.ROUTER})
NORM_READERS = {"attn_norm": _ATTENTION_INPUT, "ffn_norm": _FFN_INPUT, "output_norm": frozenset({Role.HEAD})}


def refuses_norms(architecture: Architecture) -> str | None:
    """Why nothing can be folded into or through the norms of this family, or None."""
    family = architecture.family
    if family in PLAIN:
        return None
    return f"{family}: {DIFFERENT.get(family, 'it is not known how its norms multiply')}"


def block_linears(architecture: Architecture, block: int) -> list[Linear]:
    return [linear for linear in architecture.linears if linear.block == block]


def norm_readers(architecture: Architecture, norm: Carried) -> list[Linear]:
    """The Linears that read the output of `norm`; none for the norm before a tied head, or of queries and keys."""
    roles = NORM_READERS.get(norm.role, frozenset())
    return [linear for linear in architecture.linears if linear.role in roles and linear.block == norm.block]


def biases(architecture: Architecture, linears: Sequence[Linear]) -> list[Carried]:
    """The biases of these Linears, in order, where they have one."""
    found = [architecture.carried_by_name.get(f"{linear.name}_bias") for linear in linears]
    return [carried for carried in found if carried is not None]
