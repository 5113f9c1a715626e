"""Which GGUF tensor each matrix and each carried tensor becomes, in which row order, per model family.

Names come from `gguf`'s own table. Source of the family facts: what llama.cpp's loader asks for (src/models/*.cpp).
"""

from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt

from anyquant.core.errors import UnsupportedError
from anyquant.core.extras import require
from anyquant.core.linear import Carried, Linear, Role
from anyquant.models.architecture import Architecture

QKV_BIASES = frozenset({"attn_q_bias", "attn_k_bias", "attn_v_bias"})
LLAMA_BIASES = QKV_BIASES | {"attn_output_bias", "ffn_gate_bias", "ffn_up_bias", "ffn_down_bias"}
SHARED_SCALINGS = frozenset({"linear", "yarn"})
# the name of the row permutation in a Unit
PAIRED = "rope-pairs"
PERMUTED_ROLES = frozenset({Role.ATTN_Q.value, Role.ATTN_K.value, "attn_q_bias", "attn_k_bias"})


@dataclass(frozen=True)
class GGUFFamily:
    """What llama.cpp expects of a model family.

    `arch` is the member of gguf.MODEL_ARCH. `paired`: rotary embedding turns neighbouring rows, so q and k rows are
    reordered. `square`: q has as many rows as the hidden size. `biases` and `scalings` are those that the loader reads.
    """

    arch: str
    paired: bool
    square: bool
    biases: frozenset[str]
    scalings: frozenset[str]


LLAMA = GGUFFamily("LLAMA", True, False, LLAMA_BIASES, SHARED_SCALINGS | {"llama3"})
FAMILIES = {
    "llama": LLAMA,
    "mistral": LLAMA,
    "qwen2": GGUFFamily("QWEN2", False, True, QKV_BIASES, SHARED_SCALINGS),
    "qwen3": GGUFFamily("QWEN3", False, False, QKV_BIASES, SHARED_SCALINGS),
    "phi3": GGUFFamily("PHI3", False, True, frozenset(), frozenset({"longrope"})),
}


@dataclass(frozen=True)
class Target:
    """One GGUF tensor: the rows of `linears` in order, or one carried tensor."""

    name: str
    linears: tuple[Linear, ...] = ()
    carried: Carried | None = None
    paired: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        """(rows, columns), or (length,)."""
        if self.carried is not None:
            return (self.carried.length,)
        return sum(linear.view.rows for linear in self.linears), self.linears[0].view.columns


def family_of(architecture: Architecture) -> GGUFFamily:
    """Raises UnsupportedError for a family that is not written to GGUF."""
    found = FAMILIES.get(architecture.family)
    if found is None:
        known = ", ".join(FAMILIES)
        raise UnsupportedError(f"model family {architecture.family!r} is not written to GGUF; written are: {known}")
    return found


def targets(architecture: Architecture) -> tuple[Target, ...]:
    """Every tensor of the file, in file order: embedding, blocks, final norm, head.

    Raises UnsupportedError for a family or a tensor that GGUF has no name for.
    """
    family = family_of(architecture)
    found: dict[str, Target] = {}
    items: list[Linear | Carried] = [*architecture.linears, *architecture.carried]
    for item in sorted(items, key=lambda item: _order(item, architecture)):
        source = item.view.tensor if isinstance(item, Linear) else item.tensor
        name = _name(architecture, family, source)
        paired = family.paired and item.role in PERMUTED_ROLES
        if isinstance(item, Carried):
            if name in found:
                raise UnsupportedError(f"{source}: a bias of a fused matrix is not written to GGUF")
            found[name] = Target(name, carried=item, paired=paired)
        elif name in found:
            found[name] = Target(name, (*found[name].linears, item), paired=paired)
        else:
            found[name] = Target(name, (item,), paired=paired)
    return tuple(found.values())


def _order(item: Linear | Carried, architecture: Architecture) -> tuple[int, int]:
    block = item.block
    if block is None:
        block = -1 if item.role == Role.EMBEDDING else architecture.dimensions.blocks
    return block, item.view.start if isinstance(item, Linear) else 0


@cache
def _table(arch: str, blocks: int) -> Any:
    gguf = require("gguf")
    return gguf.get_tensor_name_map(gguf.MODEL_ARCH[arch], blocks)


def _name(architecture: Architecture, family: GGUFFamily, source: str) -> str:
    table = _table(family.arch, architecture.dimensions.blocks)
    name: str | None = table.get_name(source, try_suffixes=(".weight", ".bias"))
    if name is None:
        raise UnsupportedError(f"tensor {source} has no name in GGUF's {family.arch.lower()} architecture")
    return name


def paired_rows(rows: int, head_dim: int) -> npt.NDArray[np.intp]:
    """Source row of each stored row, for whole heads.

    Hugging Face rotates row i of a head with row i + head_dim / 2, ggml's "normal" mode rows 2 i and 2 i + 1.
    """
    heads = np.arange(rows).reshape(-1, 2, head_dim // 2)
    return np.ascontiguousarray(heads.swapaxes(1, 2)).reshape(-1)
