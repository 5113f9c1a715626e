"""Architecture: the model as blocks of Linears with roles, found structurally from config and tensor names."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from anyquant.core.linear import Carried, Linear
from anyquant.core.plan import EMPTY


@dataclass(frozen=True)
class Dimensions:
    """The numbers of a decoder. Sizes in elements; `rope_scaling` as in the config, empty when there is none.

    `window` is the sliding-attention window in tokens, None for full attention.
    """

    hidden: int
    intermediate: int
    blocks: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    context: int
    norm_epsilon: float
    rope_theta: float
    rope_dim: int
    rope_scaling: Mapping[str, Any] = field(default_factory=lambda: EMPTY)
    window: int | None = None
    experts: int = 0
    experts_used: int = 0
    expert_intermediate: int = 0


@dataclass(frozen=True)
class Architecture:
    """`family` is the model type ("llama", "qwen3" ...); `linears` and `carried` are in order of the forward pass.

    `tied` tells that the head is the embedding matrix: then there is no head Linear. `block_path` is the path of the
    block list in the `transformers` model ("model.layers"). `unused` maps source tensors without a place in the model
    (rotary caches and the like) to the reason.
    """

    family: str
    class_name: str
    dimensions: Dimensions
    linears: tuple[Linear, ...]
    carried: tuple[Carried, ...]
    tied: bool
    block_path: str
    unused: Mapping[str, str] = field(default_factory=lambda: EMPTY)

    @cached_property
    def by_name(self) -> dict[str, Linear]:
        return {linear.name: linear for linear in self.linears}

    @cached_property
    def carried_by_name(self) -> dict[str, Carried]:
        return {carried.name: carried for carried in self.carried}
