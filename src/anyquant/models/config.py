"""config.json, read with suspicion: the numbers of a decoder, or one line saying which field cannot be right.

A field that changes the computation in a way that AnyQuant does not know is refused by name and value. Both spellings
of the rotary settings are read: `rope_theta` + `rope_scaling`, and `rope_parameters` (transformers 5).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from anyquant.core.errors import BadInputError, UnsupportedError
from anyquant.core.linear import Role
from anyquant.models.architecture import Dimensions
from anyquant.models.families import FAMILIES, Family
from anyquant.models.fields import HARMLESS, NEUTRAL, READ, is_note, shown
from anyquant.models.rope import read_rope

LIMIT = 1 << 31
BLOCKS_LIMIT = 1 << 14
EXPERTS_LIMIT = 1 << 14


@dataclass(frozen=True)
class Settings:
    """What detection needs of the config.

    `sparse_blocks` are the blocks whose feed-forward part has experts, `biased` the roles that have a bias.
    `shared_expert` is the intermediate size of the expert that every token uses, 0 without one.
    """

    family: Family
    dimensions: Dimensions
    tied: bool
    shared_expert: int
    sparse_blocks: frozenset[int]
    biased: frozenset[Role]


def read_config(config: Mapping[str, Any], where: str) -> Settings:
    """Settings of the model at `where`. Raises BadInputError for values that cannot be, UnsupportedError otherwise."""
    if not config:
        raise BadInputError(f"{where}: there is no config.json, or it is empty; AnyQuant needs a Hugging Face folder")
    refuse_quantized(config, where)
    family = _family(config, where)
    _refuse_unknown_fields(config, family, where)
    config = {**family.absent, **config}
    reader = Fields(config, where)
    hidden, heads = reader.size("hidden_size"), reader.size("num_attention_heads")
    kv_heads = reader.size("num_key_value_heads", heads)
    if heads % kv_heads:
        raise BadInputError(
            f"{where}: num_attention_heads = {heads} is not a multiple of num_key_value_heads = {kv_heads}"
        )
    if config.get("head_dim") is None and hidden % heads:
        raise BadInputError(f"{where}: hidden_size = {hidden} is not a multiple of num_attention_heads = {heads}")
    head_dim = reader.size("head_dim", hidden // heads)
    blocks = reader.size("num_hidden_layers")
    if blocks > BLOCKS_LIMIT:
        raise BadInputError(
            f"{where}: num_hidden_layers = {blocks} is more than the {BLOCKS_LIMIT} that AnyQuant reads"
        )
    context = reader.size("max_position_embeddings")
    theta, rope_dim, scaling = read_rope(config, family, head_dim, context, where)
    experts, used, expert_size, shared = _experts(reader, family)
    dimensions = Dimensions(
        hidden=hidden,
        intermediate=reader.size("intermediate_size"),
        blocks=blocks,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        vocabulary=reader.size("vocab_size"),
        context=context,
        norm_epsilon=reader.positive("rms_norm_eps"),
        rope_theta=theta,
        rope_dim=rope_dim,
        rope_scaling=scaling,
        window=_window(reader, family, blocks),
        experts=experts,
        experts_used=used,
        expert_intermediate=expert_size,
    )
    biased = {
        role for bias in family.biases if not bias.field or reader.flag(bias.field, bias.default) for role in bias.roles
    }
    tied = reader.flag("tie_word_embeddings", False)
    return Settings(
        family, dimensions, tied, shared, _sparse_blocks(reader, family, blocks, experts), frozenset(biased)
    )


@dataclass(frozen=True)
class Fields:
    """Typed access to a config; every failure names the field, the value and the place."""

    config: Mapping[str, Any]
    where: str

    def size(self, field: str, default: int | None = None) -> int:
        """A positive integer."""
        value = self.config.get(field)
        value = default if value is None else value
        if value is None:
            raise BadInputError(f"{self.where}: config.json has no {field}")
        if isinstance(value, bool) or not isinstance(value, int) or not 0 < value < LIMIT:
            raise BadInputError(f"{self.where}: {field} = {shown(value)} is not a positive integer")
        return value

    def positive(self, field: str) -> float:
        """A positive finite number."""
        value = self.config.get(field)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf"):
            raise BadInputError(f"{self.where}: {field} = {shown(value)} is not a positive number")
        return float(value)

    def flag(self, field: str, default: bool) -> bool:
        value = self.config.get(field)
        value = default if value is None else value
        if not isinstance(value, bool):
            raise BadInputError(f"{self.where}: {field} = {shown(value)} is not true or false")
        return value

    def unsupported(self, field: str, reason: str) -> UnsupportedError:
        return UnsupportedError(f"{self.where}: {field} = {shown(self.config.get(field))}: {reason}")


def refuse_quantized(config: Mapping[str, Any], where: str) -> None:
    """Raise UnsupportedError when a config says that the weights are quantized."""
    settings = config.get("quantization_config") or config.get("compression_config") or config.get("quantization")
    if settings:
        named = settings.get("quant_method") if isinstance(settings, Mapping) else settings
        named = "mlx" if "quantization" in config else named
        raise UnsupportedError(
            f"{where}: the checkpoint is already quantized (quantization_config: {named or 'method not named'}); "
            "start from the original floating-point weights"
        )


def _family(config: Mapping[str, Any], where: str) -> Family:
    known = sorted(FAMILIES)
    model_type = config.get("model_type")
    if not isinstance(model_type, str):
        raise BadInputError(f"{where}: model_type = {shown(model_type)} in config.json does not name a model family")
    if model_type not in FAMILIES:
        raise UnsupportedError(f"{where}: unknown model_type {shown(model_type)}; known: {', '.join(known)}")
    family = FAMILIES[model_type]
    architectures = config.get("architectures")
    if architectures is not None and architectures != [family.class_name]:
        raise UnsupportedError(
            f"{where}: architectures = {shown(architectures)} is not supported; {model_type} has {family.class_name}"
        )
    return family


def _refuse_unknown_fields(config: Mapping[str, Any], family: Family, where: str) -> None:
    """Every field must be read, known to be harmless, or neutral; null, false and empty values ask for nothing."""
    understood = READ | family.extra | {bias.field for bias in family.biases}
    if family.window or family.window_switch:
        understood |= {"sliding_window", "use_sliding_window", "max_window_layers", "layer_types"}
    for field, value in config.items():
        if field in understood or field in HARMLESS or is_note(field):
            continue
        if value is None or value is False or value in ("", [], {}):
            continue
        if field in NEUTRAL and not isinstance(value, dict | list) and value in NEUTRAL[field]:
            continue
        raise UnsupportedError(
            f"{where}: {field} = {shown(value)} in config.json is not known for {family.model_type}, so it could "
            "change what the model computes; if it is only a note, remove it from a copy of config.json"
        )
    for field in sorted(READ & NEUTRAL.keys()):
        if config.get(field) is not None and config[field] not in NEUTRAL[field]:
            raise UnsupportedError(
                f"{where}: {field} = {shown(config[field])} is not supported; only {NEUTRAL[field][0]!r}"
            )


def _window(reader: Fields, family: Family, blocks: int) -> int | None:
    """The sliding window that all blocks share, or None. One that differs between blocks is refused."""
    config = reader.config
    active = reader.flag(family.window_switch, False) if family.window_switch else True
    kinds = config.get("layer_types")
    if kinds is not None and (not isinstance(kinds, list) or len(kinds) != blocks):
        raise BadInputError(f"{reader.where}: layer_types does not list the {blocks} blocks of the model")
    if not active or config.get("sliding_window") is None:
        if kinds is not None and any(kind != "full_attention" for kind in kinds):
            raise reader.unsupported(
                "layer_types", "there is no sliding window in this model, so all must be full_attention"
            )
        return None
    window = reader.size("sliding_window")
    if not family.window:
        raise reader.unsupported("sliding_window", f"sliding attention is not supported for {family.model_type}")
    if kinds is None and family.window_layers:
        first = config.get("max_window_layers", 28)
        if isinstance(first, bool) or not isinstance(first, int) or first < 0:
            raise BadInputError(f"{reader.where}: max_window_layers = {shown(first)} is not a number of layers")
        kinds = ["full_attention" if index < first else "sliding_attention" for index in range(blocks)]
    if kinds is None or all(kind == "sliding_attention" for kind in kinds):
        return window
    if all(kind == "full_attention" for kind in kinds) and family.window_layers:
        return None
    raise reader.unsupported("layer_types", "a sliding window in some blocks only is not supported")


def _experts(reader: Fields, family: Family) -> tuple[int, int, int, int]:
    """(experts, used per token, their intermediate size, that of the shared expert); zeros for a dense family."""
    if not family.sparse:
        return 0, 0, 0, 0
    field = "num_local_experts" if reader.config.get("num_experts") is None else "num_experts"
    experts, used = reader.size(field), reader.size("num_experts_per_tok")
    if experts > EXPERTS_LIMIT or used > experts:
        raise BadInputError(f"{reader.where}: {field} = {experts} with num_experts_per_tok = {used} cannot be right")
    size = reader.size("moe_intermediate_size" if "moe_intermediate_size" in family.extra else "intermediate_size")
    shared = reader.size("shared_expert_intermediate_size") if "shared_expert_intermediate_size" in family.extra else 0
    return experts, used, size, shared


def _sparse_blocks(reader: Fields, family: Family, blocks: int, experts: int) -> frozenset[int]:
    """Blocks with experts: every `decoder_sparse_step`-th one that `mlp_only_layers` does not name."""
    if not experts:
        return frozenset()
    if not family.dense:
        return frozenset(range(blocks))
    step = reader.size("decoder_sparse_step", 1)
    dense = reader.config.get("mlp_only_layers") or []
    if not isinstance(dense, list) or not all(isinstance(index, int) for index in dense):
        raise BadInputError(f"{reader.where}: mlp_only_layers = {shown(dense)} is not a list of block numbers")
    return frozenset(index for index in range(step - 1, blocks, step) if index not in set(dense))
