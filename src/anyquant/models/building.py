"""The `transformers` model of a config.json: its structure without weights, and what files call its parameters.

No code of the model's folder is run: classes are those of the installed `transformers`, chosen by the config's
`model_type`, and only plain values of the config reach them.
"""

import re
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from anyquant.core.errors import BadInputError, UnsupportedError
from anyquant.core.extras import require

# model_type -> (config class, model class) of transformers
FAMILIES: Mapping[str, tuple[str, str]] = {
    "llama": ("LlamaConfig", "LlamaForCausalLM"),
    "mistral": ("MistralConfig", "MistralForCausalLM"),
    "qwen2": ("Qwen2Config", "Qwen2ForCausalLM"),
    "qwen3": ("Qwen3Config", "Qwen3ForCausalLM"),
    "phi3": ("Phi3Config", "Phi3ForCausalLM"),
    "mixtral": ("MixtralConfig", "MixtralForCausalLM"),
    "qwen2_moe": ("Qwen2MoeConfig", "Qwen2MoeForCausalLM"),
    "qwen3_moe": ("Qwen3MoeConfig", "Qwen3MoeForCausalLM"),
}

# the fields of their config.json that shape the computation; nothing else of the file reaches transformers
FIELDS = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "hidden_act", "rms_norm_eps"),
    *("num_attention_heads", "num_key_value_heads", "head_dim", "attention_bias", "mlp_bias", "tie_word_embeddings"),
    *("max_position_embeddings", "original_max_position_embeddings", "partial_rotary_factor"),
    *("rope_theta", "rope_scaling", "rope_parameters"),
    *("sliding_window", "use_sliding_window", "max_window_layers", "layer_types", "qkv_bias"),
    *("num_experts", "num_local_experts", "num_experts_per_tok", "moe_intermediate_size", "norm_topk_prob"),
    *("shared_expert_intermediate_size", "decoder_sparse_step", "mlp_only_layers"),
)

# of other families every field may shape it, but for those that steer transformers itself
SWITCHES = {
    *("model_type", "architectures", "auto_map", "name_or_path", "trust_remote_code", "code_revision"),
    *("attn_implementation", "experts_implementation", "use_kernels", "kernel_config", "gradient_checkpointing"),
    *("quantization_config", "compression_config", "dtype", "torch_dtype", "transformers_version"),
    *("use_cache", "output_attentions", "output_hidden_states", "return_dict"),
}

BLOCK_COUNTS = ("num_hidden_layers", "num_layers", "n_layer", "n_layers")

# where transformers lists which classes a model type has, in the order of preference
TASKS = ("FOR_CAUSAL_LM", "FOR_MASKED_LM", "", "FOR_PRETRAINING", "FOR_SEQUENCE_CLASSIFICATION")
TASKS_NAMED = (*TASKS, "FOR_TOKEN_CLASSIFICATION", "FOR_QUESTION_ANSWERING")


def plain(value: Any) -> Any:
    """A JSON value without keys that begin with an underscore or steer transformers, on every level."""
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items() if not str(key).startswith("_") and key not in SWITCHES}
    return [plain(item) for item in value] if isinstance(value, list | tuple) else value


def model_class(config: Mapping[str, Any], location: str) -> str:
    """Name of the class of transformers for this config: the one it names where that is one for its model type.

    Raises UnsupportedError for a model type that the installed transformers does not have.
    """
    family = str(config.get("model_type"))
    if family in FAMILIES:
        return FAMILIES[family][1]
    auto = require("transformers.models.auto.modeling_auto")
    found: list[str] = []
    for task in TASKS_NAMED:
        listed = getattr(auto, f"MODEL_{task}_MAPPING_NAMES".replace("__", "_")).get(family, ())
        found += [listed] if isinstance(listed, str) else listed
    if family not in require("transformers").CONFIG_MAPPING or not found:
        raise UnsupportedError(
            f"{location}: unknown model_type {family!r}; known: {', '.join(sorted(FAMILIES))}, and the text models of "
            "the installed transformers, which has none of this name"
        )
    named = config.get("architectures")
    wanted = named[0] if isinstance(named, list) and named else None
    return str(wanted) if wanted in found else found[0]


def build_structure(config: Mapping[str, Any], location: str, tensors: int) -> Any:
    """The `transformers` model of a `config.json`: parameters on meta, buffers real, evaluation mode.

    A config that claims more blocks than its checkpoint has `tensors` is refused before anything is built from it.

    Of the families in the table only `FIELDS` of the config are used, of others all but `SWITCHES`. `location` is for
    error messages. Raises UnsupportedError for a model type that there is no class for, BadInputError when
    transformers refuses the values.
    """
    family = str(config.get("model_type"))
    name = model_class(config, location)
    for field in BLOCK_COUNTS:
        claimed = config.get(field, 0)
        if not isinstance(claimed, int) or claimed > tensors:
            raise BadInputError(
                f"{location}: config.json claims {field} {claimed!r}, the checkpoint holds {tensors} tensors"
            )
    transformers, accelerate = require("transformers"), require("accelerate")
    if family in FAMILIES:
        # no padding id: it may lie outside the vocabulary, and nothing is padded
        fields = {key: plain(value) for key, value in config.items() if key in FIELDS} | {"pad_token_id": None}
    else:
        fields = plain(config)
    if fields.get("is_encoder_decoder"):
        raise UnsupportedError(f"{location}: {family} has an encoder and a decoder, which is not supported")
    try:
        settings = transformers.CONFIG_MAPPING[family](**fields, use_cache=False)
        settings._attn_implementation = "sdpa" if getattr(transformers, name)._supports_sdpa else "eager"
        settings._experts_implementation = "eager"  # one product per expert, as statistics need it
        with accelerate.init_empty_weights(include_buffers=False):
            return getattr(transformers, name)(settings).eval()
    except Exception as error:  # the config is foreign data, and transformers raises whatever it trips over
        raise BadInputError(f"{location}: config.json does not describe a {family} model: {error}") from error


def block_list(module: Any, location: str) -> str:
    """Path of the blocks: the ModuleList of modules of one class that holds most parameters.

    Raises UnsupportedError when there is none.
    """
    lists = require("torch").nn.ModuleList
    sizes: dict[str, int] = {
        str(name): sum(parameter.numel() for parameter in found.parameters())
        for name, found in module.named_modules()
        if isinstance(found, lists) and len({type(child) for child in found}) == 1
    }
    if not sizes:
        raise UnsupportedError(f"{location}: {type(module).__name__} has no list of equal blocks")
    return max(sizes, key=lambda name: sizes[name])


def stored_names(module: Any, tensors: Collection[str]) -> dict[str, str]:
    """Parameter or stored buffer of the model -> what a checkpoint with these tensors calls it, if it is stored alone.

    The names of older checkpoints are those that transformers knows. Tied parameters have the name of the one they are
    tied to.
    """
    parameters = module.state_dict()
    found = {name: name for name in tensors if name in parameters}
    for name, new, step, _ in _renamed(module, set(tensors) - found.keys()):
        if step is None:
            found.setdefault(new, name)
    ties = module.all_tied_weights_keys
    return {name: found[ties.get(name, name)] for name in parameters if ties.get(name, name) in found}


def stacked_names(module: Any, tensors: Collection[str]) -> dict[str, dict[int, list[str]]]:
    """3-D parameter of the model -> expert -> the tensors of a checkpoint that lie one below the other in its slice.

    For checkpoints with a tensor per expert, where transformers does nothing but stack them.
    """
    found: dict[str, dict[tuple[int, int], str]] = {}
    for name, new, step, part in _renamed(module, tensors):
        number = re.search(r"\bexperts\.(\d+)\.", name)
        if step is not None and number and _only_stacks(step):
            found.setdefault(new, {})[int(number[1]), part] = name
    stacks: dict[str, dict[int, list[str]]] = {}
    for parameter, places in found.items():
        for (expert, _), name in sorted(places.items()):
            stacks.setdefault(parameter, {}).setdefault(expert, []).append(name)
    return stacks


def _only_stacks(step: Any) -> bool:
    kinds = [(type(operation).__name__, getattr(operation, "dim", None)) for operation in step.operations]
    return kinds in ([("MergeModulelist", 0)], [("MergeModulelist", 0), ("Concatenate", 1)])


def _renamed(module: Any, tensors: Collection[str]) -> Iterator[tuple[str, str, Any, int]]:
    """(tensor, the parameter it goes to, the step of transformers that converts it or None, which of its sources)."""
    loading = require("transformers.core_model_loading")
    steps = require("transformers.conversion_mapping").get_model_conversion_mapping(module)
    converters = [step for step in steps if isinstance(step, loading.WeightConverter)]
    renamings = [step for step in steps if not isinstance(step, loading.WeightConverter)]
    parameters = module.state_dict()
    sources = {pattern: (step, part) for step in converters for part, pattern in enumerate(step.source_patterns)}
    for name in sorted(tensors):
        new, pattern = loading.rename_source_key(name, renamings, converters, module.base_model_prefix, parameters)
        if new in parameters:
            yield name, new, *sources.get(pattern, (None, 0))
