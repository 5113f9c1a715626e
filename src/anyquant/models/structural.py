"""The architecture of any text model of `transformers`, found by looking at its modules and running a block once.

For model types without a row in models.families. Matrices are the weights of Linear modules (and of GPT-2's Conv1D,
which are stored the other way round) inside the blocks, and those of experts (models.stacks); everything else is
carried over in float.
"""

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from anyquant.core.checkpoint import Checkpoint
from anyquant.core.errors import BadInputError, UnsupportedError
from anyquant.core.extras import require
from anyquant.core.linear import Carried, Linear, Role, View
from anyquant.models.architecture import Architecture, Dimensions
from anyquant.models.building import block_list, build_structure, stored_names
from anyquant.models.config import refuse_quantized as refuse_quantized_config
from anyquant.models.families import FAMILIES, HEAD_INPUT
from anyquant.models.products import watch_products
from anyquant.models.stacks import expert_linears
from anyquant.models.stored import leftovers, refuse_quantized, same_values
from anyquant.models.streaming import StreamedModel

PREFIX = "transformers:"  # of the family of such an architecture
PROBE = [[0, 1]]  # token ids that every vocabulary has
CONSTANT = "a constant, which transformers computes"

# Last name of a module -> role, by where it is. A fused projection has the role of its first part.
ATTENTION_ROLES: Mapping[str, Role] = {
    **dict.fromkeys(("q_proj", "query", "q_lin", "q", "wq"), Role.ATTN_Q),
    **dict.fromkeys(("k_proj", "key", "k_lin", "k", "wk"), Role.ATTN_K),
    **dict.fromkeys(("v_proj", "value", "v_lin", "v", "wv"), Role.ATTN_V),
    **dict.fromkeys(("o_proj", "out_proj", "out_lin", "dense", "c_proj", "o", "wo"), Role.ATTN_OUTPUT),
    **dict.fromkeys(("c_attn", "query_key_value", "qkv_proj", "qkv", "wqkv", "att_proj"), Role.ATTN_Q),
}
FEED_FORWARD_ROLES: Mapping[str, Role] = {
    **dict.fromkeys(("gate_proj", "w1", "gate"), Role.FFN_GATE),
    **dict.fromkeys(("up_proj", "fc1", "lin1", "c_fc", "fc_in", "dense_h_to_4h", "w3", "wi"), Role.FFN_UP),
    **dict.fromkeys(("down_proj", "fc2", "lin2", "c_proj", "fc_out", "dense_4h_to_h", "w2", "wo"), Role.FFN_DOWN),
}
SIZES = ("intermediate_size", "ffn_dim", "n_inner", "ffn_hidden_size", "hidden_dim")
EPSILONS = ("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "layernorm_epsilon", "norm_epsilon")


@dataclass(frozen=True)
class Found:
    """A matrix of a block: module path and weight below the block, and the place of its input in the order of calls."""

    module: str
    shape: tuple[int, int]
    transposed: bool
    source: int


def is_other(config: Mapping[str, Any]) -> bool:
    """Whether a config names a model type that the table of families does not have."""
    return isinstance(config.get("model_type"), str) and config["model_type"] not in FAMILIES


def describe(checkpoint: Checkpoint) -> Architecture:
    """The architecture of a checkpoint of any model type; its family is "transformers:<model type>".

    Weights are not read, but for norms and the like outside the blocks. Raises UnsupportedError for a model type that
    the installed transformers does not have, one whose blocks are not called one after the other, and experts that are
    stored or applied in an unknown way; BadInputError when tensors are missing or have other shapes.
    """
    where, names = checkpoint.location, set(checkpoint.names())
    refuse_quantized_config(checkpoint.config, where)
    unused = leftovers(names)
    module = build_structure(checkpoint.config, where, len(names))
    path = block_list(module, where)
    others = names - set(stored_names(module, names).values())
    ignored = module._keys_to_ignore_on_load_unexpected or ()
    unused |= {name: CONSTANT for name in sorted(others) if any(re.search(pattern, name) for pattern in ignored)}
    refuse_quantized(checkpoint, names - unused.keys())
    experts = tuple(expert_linears(checkpoint, module, path))
    blank = Architecture(
        family=PREFIX + str(checkpoint.config["model_type"]),
        class_name=type(module).__name__,
        dimensions=_dimensions(module, path, 1 + max((linear.expert or 0 for linear in experts), default=-1)),
        linears=experts,
        carried=(),
        tied=False,
        block_path=path,
    )
    model = StreamedModel(checkpoint, blank)
    parts = _Parts(model, path)
    linears, carried = tuple(parts.linears()), tuple(parts.carried())
    used = {linear.view.tensor for linear in linears} | {item.tensor for item in carried}
    unused |= _unused(model, names - used - unused.keys())
    return Architecture(blank.family, blank.class_name, blank.dimensions, linears, carried, parts.tied, path, unused)


class _Parts:
    """Linears and carried tensors of a model, in order of the forward pass."""

    def __init__(self, model: StreamedModel, path: str) -> None:
        self._path, self._names = path, model.stored
        values = [*model.module.named_parameters(remove_duplicate=False), *model.module.named_buffers()]
        self._shapes = {name: tuple(value.shape) for name, value in values if name in model.stored or value.is_meta}
        self._experts = model.architecture.linears
        self._stacks = {place.parameter for place in model.places.values()}
        self._blocks = _find_matrices(model)
        self._embedding = model.embedding_module
        self._head = model.head_module
        ties: Mapping[str, str] = model.module.all_tied_weights_keys
        self.tied = ties.get(f"{self._head}.weight") == f"{self._embedding}.weight"
        self._roles: dict[str, Role] = {}

    def linears(self) -> Iterator[Linear]:
        yield self._edge("embedding", Role.EMBEDDING, self._embedding, HEAD_INPUT if self.tied else "")
        for index, matrices in enumerate(self._blocks):
            first = {matrix.source: matrix.module for matrix in reversed(matrices)}
            for matrix in matrices:
                module = f"{self._path}.{index}.{matrix.module}"
                view = View(self._stored(f"{module}.weight"), 0, *matrix.shape, matrix.transposed)
                role = self._roles[module] = role_of(matrix.module, view.rows < view.columns)
                group = f"blocks.{index}.{first[matrix.source]}.input"
                yield Linear(f"blocks.{index}.{matrix.module}", role, view, index, group, module)
            yield from (linear for linear in self._experts if linear.block == index)
        if self._head and not self.tied:
            yield self._edge("head", Role.HEAD, self._head, HEAD_INPUT)

    def carried(self) -> Iterator[Carried]:
        """Everything that is no Linear; what is tied to another parameter is carried once."""
        seen: set[str] = set()
        edges = {f"{self._embedding}.weight", f"{self._head}.weight"}
        matrices = {f"{module}.weight" for module in self._roles} | self._stacks
        for name, shape in self._shapes.items():
            if name in edges or name in matrices or self._stored(name) in seen:
                continue
            tensor = self._stored(name)
            seen.add(tensor)
            inside = name.removeprefix(f"{self._path}.") if name.startswith(f"{self._path}.") else ""
            block = int(inside.partition(".")[0]) if inside else None
            own = f"blocks.{inside}" if inside else name
            yield Carried(own, self._role(name), tensor, 0, math.prod(shape), block)

    def _edge(self, name: str, role: Role, module: str, group: str) -> Linear:
        rows, columns = self._shapes[f"{module}.weight"]
        return Linear(name, role, View(self._stored(f"{module}.weight"), 0, rows, columns), None, group, module)

    def _stored(self, parameter: str) -> str:
        return self._names[parameter]

    def _role(self, parameter: str) -> str:
        module, _, leaf = parameter.rpartition(".")
        if module in self._roles and leaf == "bias":
            return f"{self._roles[module]}_bias"
        if module == self._head and leaf == "bias":
            return "head_bias"
        return "norm" if re.search(r"norm|ln_|\bln\b", parameter.lower()) else "other"


def role_of(module: str, narrowing: bool) -> Role:
    """Role of a matrix by the path of its module below the block.

    One with an unknown name is called after what it could be: a query or a `narrowing` (fewer outputs than inputs) down
    projection, else an up projection.
    """
    *above, leaf = module.lower().split(".")
    around = ".".join(above)
    if "attn" in around or "attention" in around:
        return ATTENTION_ROLES.get(leaf, Role.ATTN_Q)
    if leaf in FEED_FORWARD_ROLES:
        return FEED_FORWARD_ROLES[leaf]
    return Role.FFN_DOWN if narrowing else Role.FFN_UP


def _find_matrices(model: StreamedModel) -> list[list[Found]]:
    """The matrices of every block in the order of their calls; blocks of equal modules are run once, on zeros."""
    torch = require("torch")
    kinds = (torch.nn.Linear, require("transformers.pytorch_utils").Conv1D)
    (batch,) = model.embed(PROBE)
    known: dict[tuple[Any, ...], list[Found]] = {}
    blocks = []
    for index in range(model.blocks):
        block = model.module.get_submodule(f"{model.architecture.block_path}.{index}")
        shapes = {name: tuple(parameter.shape) for name, parameter in block.named_parameters()}
        modules = {name: found for name, found in block.named_modules() if isinstance(found, kinds)}
        signature = (*shapes.items(), *modules)
        if signature not in known:
            try:
                inputs = _run(model, index, block, batch, modules)
            except UnsupportedError:
                raise
            except Exception as error:  # of the modelling code, which the config did not fit
                raise BadInputError(
                    f"{model.checkpoint.location}: {model.architecture.block_path}.{index} cannot be run: {error}"
                ) from error
            missed = modules.keys() - inputs.keys()
            if missed:
                raise UnsupportedError(
                    f"{model.checkpoint.location}: {model.architecture.block_path}.{index}.{min(missed)} takes no part "
                    "when the model reads a text, which is not supported"
                )
            known[signature] = [
                _found(name, modules[name], isinstance(modules[name], kinds[1]), source)
                for name, source in inputs.items()
            ]
        blocks.append(known[signature])
    return blocks


def _found(name: str, module: Any, transposed: bool, source: int) -> Found:
    rows, columns = tuple(module.weight.shape)
    return Found(name, (columns, rows) if transposed else (rows, columns), transposed, source)


def _run(model: StreamedModel, index: int, block: Any, batch: Any, modules: Mapping[str, Any]) -> dict[str, int]:
    """Module -> the number of its input, in the order of calls; views of one tensor are one input."""
    torch = require("torch")
    held: list[Any] = []  # so that no address is used twice
    sources: dict[tuple[int, int], int] = {}
    order: dict[str, int] = {}

    def watch(name: str) -> Any:
        def hook(module: Any, arguments: tuple[Any, ...], keywords: Mapping[str, Any]) -> None:
            entering = arguments[0] if arguments else next(iter(keywords.values()))
            held.append(entering)
            order.setdefault(name, sources.setdefault((entering.data_ptr(), entering.numel()), len(sources)))

        return hook

    handles = [found.register_forward_pre_hook(watch(name), with_kwargs=True) for name, found in modules.items()]
    zeros = {name: torch.zeros(tuple(parameter.shape)) for name, parameter in block.named_parameters()}
    full = {f"{model.architecture.block_path}.{index}.{name}": values for name, values in zeros.items()}
    stacks = {
        place.of(full[place.parameter]).data_ptr(): place.parameter
        for place in model.places.values()
        if place.parameter in full
    }
    reached: set[str] = set()
    try:
        with torch.no_grad(), watch_products(stacks, lambda parameter, _: reached.add(parameter)):
            model.apply(index, block, batch, batch.states, zeros)
    finally:
        for handle in handles:
            handle.remove()
    for parameter in sorted(set(stacks.values()) - reached):
        raise UnsupportedError(
            f"{model.checkpoint.location}: the matrices in {parameter} are not applied one by one: not supported"
        )
    return order


def _unused(model: StreamedModel, names: set[str]) -> dict[str, str]:
    """Tensors that the model class has no parameter for -> why they are left out."""
    checkpoint, module = model.checkpoint, model.module
    ties: Mapping[str, str] = module.all_tied_weights_keys
    reasons = {}
    for name in sorted(names):
        if name in ties:
            source = model.stored[name]
            if not same_values(checkpoint, checkpoint.spec(name), checkpoint.spec(source)):
                raise UnsupportedError(
                    f"{checkpoint.location}: tie_word_embeddings is true, but {name} differs from {source}; set it to "
                    "false in a copy of config.json if both are meant"
                )
            reasons[name] = f"tied to {source}, and equal to it"
        else:
            reasons[name] = f"{type(module).__name__} of transformers has no place for it"
    return reasons


def _dimensions(module: Any, path: str, experts: int) -> Dimensions:
    """What the config tells of the numbers that most models have; 0 where it does not."""
    config = module.config

    def number(names: tuple[str, ...], default: Any = 0) -> Any:
        values = (getattr(config, name, None) for name in names)
        return next((value for value in values if isinstance(value, int | float)), default)

    hidden, heads = int(number(("hidden_size",))), int(number(("num_attention_heads",), 1))
    rope = getattr(config, "rope_parameters", None) or {}
    theta = rope.get("rope_theta", 0.0) if isinstance(rope, Mapping) else 0.0
    head_dim = int(number(("head_dim",), hidden // heads))
    return Dimensions(
        hidden=hidden,
        intermediate=int(number(SIZES, 4 * hidden)),
        blocks=len(module.get_submodule(path)),
        heads=heads,
        kv_heads=int(number(("num_key_value_heads",), heads)),
        head_dim=head_dim,
        vocabulary=int(module.get_input_embeddings().weight.shape[0]),
        context=int(number(("max_position_embeddings",))),
        norm_epsilon=float(number(EPSILONS, 0.0)),
        rope_theta=float(theta),
        rope_dim=head_dim if theta else 0,
        window=getattr(config, "sliding_window", None),
        experts=experts,
        experts_used=int(number(("num_experts_per_tok", "moe_k"))),
        expert_intermediate=int(number(("moe_intermediate_size", *SIZES))) if experts else 0,
    )
