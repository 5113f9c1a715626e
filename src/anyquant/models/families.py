"""What AnyQuant knows of each model family, as data: which stored tensors a block has, and which matrices lie in them.

Adding a family is adding a row to FAMILIES. Names are those that `transformers` writes (`save_pretrained`) and those of
the published checkpoints; where a family is stored in more than one way, the ways are listed side by side.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

from anyquant.core.linear import Role


@dataclass(frozen=True)
class Slot:
    """One stored weight of a block, and the matrices that share its rows, in order.

    `tensor` is its name below the block; "{expert}" in it stands for one tensor per expert. `parts` are (role, rows),
    `columns` the row length; sizes are names of `config.sizes`. `group` names the activation that feeds it and `module`
    the module that applies it, both below the block. `stacked`: one 3-D tensor (experts, rows, columns) holds all
    experts. `owner` prefixes the names of its Linears, e.g. "shared_expert.".
    """

    tensor: str
    parts: tuple[tuple[Role, str], ...]
    columns: str
    group: str
    module: str
    stacked: bool = False
    owner: str = ""

    @property
    def per_expert(self) -> bool:
        return "{expert}" in self.tensor


@dataclass(frozen=True)
class Norm:
    """A stored 1-D weight: its name (below the block), its role, and its length as a name of `config.sizes`."""

    tensor: str
    role: str
    length: str


@dataclass(frozen=True)
class Bias:
    """These roles have a bias when the config's `field` is true (`default` when absent); always when `field` is ""."""

    roles: tuple[Role, ...]
    field: str = ""
    default: bool = False


@dataclass(frozen=True)
class Family:
    """One row of the table. The last of `norms` precedes the feed-forward part, the others belong to the attention.

    `sparse` lists the alternative ways in which a block with experts is stored (empty: the family has none).
    `rope_types` are the rotary scalings that its modelling code and AnyQuant both know, `default_theta` the rope base
    when the config gives none. `window`: a sliding window is supported; `window_switch` is the config field that turns
    it on ("" when its presence does); `window_layers`: it may differ between layers (`max_window_layers`,
    `layer_types`). `extra` are further config fields that are understood. `absent` are the values that the modelling
    code takes for fields that the config does not have, where they are not what "none" would mean.
    """

    model_type: str
    class_name: str
    attention: tuple[Slot, ...]
    dense: tuple[Slot, ...]
    norms: tuple[Norm, ...]
    biases: tuple[Bias, ...] = ()
    sparse: tuple[tuple[Slot, ...], ...] = ()
    rope_types: frozenset[str] = frozenset({"default", "linear", "llama3", "yarn"})
    default_theta: float = 10000.0
    partial_rotary: bool = False
    window: bool = False
    window_switch: str = ""
    window_layers: bool = False
    extra: frozenset[str] = frozenset()
    absent: Mapping[str, int] = field(default_factory=dict)


def _plain(module: str, role: Role, rows: str, columns: str, group: str, owner: str = "") -> Slot:
    """A matrix with a tensor and a module of its own."""
    return Slot(f"{module}.weight", ((role, rows),), columns, group, module, owner=owner)


BLOCKS = "model.layers"
EMBEDDING = "model.embed_tokens"
HEAD = "lm_head"
HEAD_INPUT = "output_input"  # input group of the head
OUTPUT_NORM = "model.norm.weight"

QKV = (Role.ATTN_Q, Role.ATTN_K, Role.ATTN_V)
ATTENTION = (*QKV, Role.ATTN_OUTPUT)
FFN = (Role.FFN_GATE, Role.FFN_UP, Role.FFN_DOWN)

_OUTPUT = _plain("self_attn.o_proj", Role.ATTN_OUTPUT, "hidden", "query", "attn_output_input")
_SPLIT_ATTENTION = (
    _plain("self_attn.q_proj", Role.ATTN_Q, "query", "hidden", "attn_input"),
    _plain("self_attn.k_proj", Role.ATTN_K, "key", "hidden", "attn_input"),
    _plain("self_attn.v_proj", Role.ATTN_V, "key", "hidden", "attn_input"),
    _OUTPUT,
)
_FUSED_ATTENTION = (
    Slot(
        "self_attn.qkv_proj.weight",
        ((Role.ATTN_Q, "query"), (Role.ATTN_K, "key"), (Role.ATTN_V, "key")),
        "hidden",
        "attn_input",
        "self_attn.qkv_proj",
    ),
    _OUTPUT,
)
_DOWN = _plain("mlp.down_proj", Role.FFN_DOWN, "hidden", "intermediate", "ffn_down_input")
_SPLIT_FFN = (
    _plain("mlp.gate_proj", Role.FFN_GATE, "intermediate", "hidden", "ffn_input"),
    _plain("mlp.up_proj", Role.FFN_UP, "intermediate", "hidden", "ffn_input"),
    _DOWN,
)
_FUSED_FFN = (
    Slot(
        "mlp.gate_up_proj.weight",
        ((Role.FFN_GATE, "intermediate"), (Role.FFN_UP, "intermediate")),
        "hidden",
        "ffn_input",
        "mlp.gate_up_proj",
    ),
    _DOWN,
)


def _experts(folder: str, names: tuple[str, str, str]) -> tuple[Slot, ...]:
    """One tensor per expert and projection; `names` are those of gate, up and down."""
    gate, up, down = (f"{folder}.experts.{{expert}}.{name}.weight" for name in names)
    return (
        Slot(gate, ((Role.FFN_GATE, "expert"),), "hidden", "ffn_input", "mlp.experts"),
        Slot(up, ((Role.FFN_UP, "expert"),), "hidden", "ffn_input", "mlp.experts"),
        Slot(down, ((Role.FFN_DOWN, "hidden"),), "expert", "ffn_down_input", "mlp.experts"),
    )


def _router(folder: str) -> Slot:
    return Slot(f"{folder}.gate.weight", ((Role.ROUTER, "experts"),), "hidden", "ffn_input", "mlp.gate")


_GATE_UP = ((Role.FFN_GATE, "expert"), (Role.FFN_UP, "expert"))
_STACKED_EXPERTS = (
    Slot("mlp.experts.gate_up_proj", _GATE_UP, "hidden", "ffn_input", "mlp.experts", stacked=True),
    Slot(
        "mlp.experts.down_proj", ((Role.FFN_DOWN, "hidden"),), "expert", "ffn_down_input", "mlp.experts", stacked=True
    ),
)
_SHARED_EXPERT = (
    _plain("mlp.shared_expert_gate", Role.ROUTER, "one", "hidden", "ffn_input", "shared_expert."),
    _plain("mlp.shared_expert.gate_proj", Role.FFN_GATE, "shared_expert", "hidden", "ffn_input", "shared_expert."),
    _plain("mlp.shared_expert.up_proj", Role.FFN_UP, "shared_expert", "hidden", "ffn_input", "shared_expert."),
    _plain(
        "mlp.shared_expert.down_proj",
        Role.FFN_DOWN,
        "hidden",
        "shared_expert",
        "shared_expert.ffn_down_input",
        "shared_expert.",
    ),
)
_QWEN_EXPERTS = _experts("mlp", ("gate_proj", "up_proj", "down_proj"))

_NORMS = (
    Norm("input_layernorm.weight", "attn_norm", "hidden"),
    Norm("post_attention_layernorm.weight", "ffn_norm", "hidden"),
)
_QK_NORMS = (
    _NORMS[0],
    Norm("self_attn.q_norm.weight", "attn_q_norm", "head"),
    Norm("self_attn.k_norm.weight", "attn_k_norm", "head"),
    _NORMS[1],
)
_LLAMA_BIASES = (Bias(ATTENTION, "attention_bias"), Bias(FFN, "mlp_bias"))
_MOE_FIELDS = frozenset({"num_experts_per_tok", "num_experts", "num_local_experts", "router_aux_loss_coef"})
_QWEN_MOE_FIELDS = _MOE_FIELDS | {"moe_intermediate_size", "norm_topk_prob", "decoder_sparse_step", "mlp_only_layers"}

FAMILIES = {
    family.model_type: family
    for family in (
        Family("llama", "LlamaForCausalLM", _SPLIT_ATTENTION, _SPLIT_FFN, _NORMS, _LLAMA_BIASES),
        Family(
            "mistral",
            "MistralForCausalLM",
            _SPLIT_ATTENTION,
            _SPLIT_FFN,
            _NORMS,
            window=True,
            absent={"num_key_value_heads": 8, "sliding_window": 4096},
        ),
        Family(
            "qwen2",
            "Qwen2ForCausalLM",
            _SPLIT_ATTENTION,
            _SPLIT_FFN,
            _NORMS,
            (Bias(QKV),),
            window=True,
            window_switch="use_sliding_window",
            window_layers=True,
            absent={"num_key_value_heads": 32, "sliding_window": 4096},
        ),
        Family(
            "qwen3",
            "Qwen3ForCausalLM",
            _SPLIT_ATTENTION,
            _SPLIT_FFN,
            _QK_NORMS,
            (Bias(ATTENTION, "attention_bias"),),
            window=True,
            window_switch="use_sliding_window",
            window_layers=True,
            absent={"num_key_value_heads": 32, "sliding_window": 4096, "head_dim": 128},
        ),
        Family(
            "phi3",
            "Phi3ForCausalLM",
            _FUSED_ATTENTION,
            _FUSED_FFN,
            _NORMS,
            rope_types=frozenset({"default", "longrope"}),
            partial_rotary=True,
            window=True,
            absent={"original_max_position_embeddings": 4096},
        ),
        Family(
            "mixtral",
            "MixtralForCausalLM",
            _SPLIT_ATTENTION,
            (),
            _NORMS,
            sparse=(
                (_router("block_sparse_moe"), *_experts("block_sparse_moe", ("w1", "w3", "w2"))),
                (_router("mlp"), *_STACKED_EXPERTS),
            ),
            default_theta=1000000.0,
            window=True,
            extra=_MOE_FIELDS | {"router_jitter_noise"},
            absent={"num_key_value_heads": 8},
        ),
        Family(
            "qwen2_moe",
            "Qwen2MoeForCausalLM",
            _SPLIT_ATTENTION,
            _SPLIT_FFN,
            _NORMS,
            (Bias(QKV, "qkv_bias", True),),
            sparse=(
                (_router("mlp"), *_SHARED_EXPERT, *_QWEN_EXPERTS),
                (_router("mlp"), *_SHARED_EXPERT, *_STACKED_EXPERTS),
            ),
            window_switch="use_sliding_window",
            window_layers=True,
            extra=_QWEN_MOE_FIELDS | {"shared_expert_intermediate_size"},
            absent={"num_key_value_heads": 16, "sliding_window": 4096},
        ),
        Family(
            "qwen3_moe",
            "Qwen3MoeForCausalLM",
            _SPLIT_ATTENTION,
            _SPLIT_FFN,
            _QK_NORMS,
            (Bias(ATTENTION, "attention_bias"),),
            sparse=((_router("mlp"), *_QWEN_EXPERTS), (_router("mlp"), *_STACKED_EXPERTS)),
            window_switch="use_sliding_window",
            window_layers=True,
            extra=_QWEN_MOE_FIELDS,
            absent={"num_key_value_heads": 4, "sliding_window": 4096},
        ),
    )
}
