"""Linear: one logical out x in matrix, wherever its bytes lie.

Fused qkv and gate_up projections, 3-D expert tensors in either orientation and merged tensors are views of stored
tensors. Statistics, decisions and the ledger speak of Linears; bytes are accounted for the tensors on both sides.
"""

from dataclasses import dataclass
from enum import StrEnum


class Role(StrEnum):
    """What a matrix does in the model. Expert matrices carry the role of the projection they are (ffn_gate ...)."""

    EMBEDDING = "embedding"
    HEAD = "head"
    ATTN_Q = "attn_q"
    ATTN_K = "attn_k"
    ATTN_V = "attn_v"
    ATTN_OUTPUT = "attn_output"
    FFN_GATE = "ffn_gate"
    FFN_UP = "ffn_up"
    FFN_DOWN = "ffn_down"
    ROUTER = "router"


@dataclass(frozen=True)
class View:
    """Where the matrix lies: rows of a stored tensor (a row is one vector of the tensor's last axis).

    Not transposed: logical row r is stored row `start + r`, all `columns` of it.
    Transposed: the stored block is `columns` rows, from `start`, of length `rows`.
    """

    tensor: str
    start: int
    rows: int
    columns: int
    transposed: bool = False


@dataclass(frozen=True)
class Linear:
    """`name` is unique in the architecture, e.g. "blocks.3.attn_q" or "blocks.3.experts.5.ffn_up".

    `input_group` names the activation that feeds it: Linears with the same input share statistics.
    `module` is the path of the module that applies it in the `transformers` model, e.g.
    "model.layers.3.self_attn.q_proj" (for a fused projection, the fused module; for the embedding, the Embedding).
    `block` is the index of the decoder block, None for embedding and head.
    """

    name: str
    role: Role
    view: View
    block: int | None
    input_group: str
    module: str
    expert: int | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        return self.view.rows, self.view.columns

    @property
    def weights(self) -> int:
        """How many."""
        return self.view.rows * self.view.columns


@dataclass(frozen=True)
class Carried:
    """A stored tensor, or `rows` of a 1-D one, that is carried over in float: a norm, a bias.

    `role` is "attn_norm", "ffn_norm", "output_norm", "attn_q_norm", "attn_k_norm", or a Linear's role + "_bias".
    `start` and `length` select elements of a 1-D tensor.
    """

    name: str
    role: str
    tensor: str
    start: int
    length: int
    block: int | None
