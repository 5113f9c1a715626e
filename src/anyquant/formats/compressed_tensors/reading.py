"""Which modules of a folder are quantized, and how: from the config groups and the headers of the weights.

A group's targets are class names ("Linear": every module with quantized tensors), exact paths, or "re:" and a regular
expression that a path begins with, as `compressed_tensors.utils.match` has them.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from anyquant.core.checkpoint import Checkpoint
from anyquant.core.errors import BadInputError, UnsupportedError
from anyquant.formats.compressed_tensors.layouts import PLAIN, SCALES, SMALL_FLOATS, Layout, layout
from anyquant.formats.folder.integers import parse

CLASSES = ("Linear", "Embedding")
SCALE, PACKED = ".weight_scale", ".weight_packed"
HEAD_MODULE = "lm_head"  # a tied head is ignored under a name that no tensor has
REGEX = "re:"
# reads of the config that change nothing about what the weights are
IDLE = ("observer", "observer_kwargs", "zp_dtype", "scale_dtype", "actorder", "group_size", "block_structure")


@dataclass(frozen=True)
class Group:
    """A config group: its targets, and the name of the layout that its arguments describe."""

    name: str
    targets: tuple[str, ...]
    variant: str

    def means(self, path: str) -> bool:
        return any(_matches(path, target) for target in self.targets)

    def names(self, path: str) -> bool:
        """Whether a target other than a class says so."""
        return any(_matches(path, target) for target in self.targets if target not in CLASSES)


def find_modules(stored: Checkpoint) -> dict[str, tuple[str, tuple[int, int]]]:
    """Path of every quantized module to the name of its layout and its shape.

    Raises BadInputError for groups that contradict each other or the tensors, UnsupportedError for what is not read.
    """
    settings, where = stored.config.get("quantization_config"), stored.location
    if settings is None:
        return {}
    if not isinstance(settings, Mapping):
        raise BadInputError(f"{where}: quantization_config is not an object")
    groups = list(_groups(settings, where))
    ignored = settings.get("ignore") or []
    names = frozenset(stored.names())
    found, met = {}, set()
    for path in sorted(name.removesuffix(SCALE) for name in names if name.endswith(SCALE)):
        if any(_matches(path, entry) for entry in ignored):
            raise BadInputError(f"{where}: {path} is on the ignore list, yet it has a weight_scale")
        group = _one(groups, path, where)
        met.add(group.name)
        variant = group.variant
        if parse(variant.removesuffix(PLAIN), tensor=True) and stored.spec(path + SCALE).dtype == SCALES[True]:
            variant = f"{variant.removesuffix(PLAIN)}-f16{PLAIN if variant.endswith(PLAIN) else ''}"
        found[path] = (variant, _shape(stored, path, layout(variant)))
    for path in sorted(name.removesuffix(PACKED) for name in names if name.endswith(PACKED)):
        if path not in found:
            raise BadInputError(f"{where}: {path} has a weight_packed and no weight_scale")
    for entry in ignored:
        if not (entry.startswith(REGEX) or entry in (*CLASSES, HEAD_MODULE) or f"{entry}.weight" in names):
            raise BadInputError(f"{where}: the ignore list names {entry}, which is not there")
    if idle := [group.name for group in groups if group.name not in met]:
        raise BadInputError(f"{where}: config group {idle[0]} matches no module with quantized tensors")
    return found


def _one(groups: list[Group], path: str, where: str) -> Group:
    """The group of a module: one that names it goes before one that means its class."""
    meant = [group for group in groups if group.names(path)] or [group for group in groups if group.means(path)]
    if not meant:
        raise BadInputError(f"{where}: {path} has quantized tensors, and no config group means it")
    if len({group.variant for group in meant}) > 1:
        raise BadInputError(f"{where}: config groups {', '.join(group.name for group in meant)} all mean {path}")
    return meant[0]


def _matches(path: str, target: Any) -> bool:
    if not isinstance(target, str):
        return False
    if target.startswith(REGEX):
        try:
            return re.match(target.removeprefix(REGEX), path) is not None
        except re.error as error:
            raise BadInputError(f"quantization_config: {target!r} is no regular expression: {error}") from None
    return target == path or target in CLASSES


def _groups(settings: Mapping[str, Any], where: str) -> Iterator[Group]:
    table = settings.get("config_groups")
    if not isinstance(table, Mapping) or not table:
        raise BadInputError(f"{where}: quantization_config has no config_groups")
    for name, group in table.items():
        if not isinstance(group, Mapping) or not isinstance(group.get("targets"), list):
            raise UnsupportedError(f"{where}: config group {name} is not read: it has no list of targets")
        weights = group.get("weights")
        if not isinstance(weights, Mapping):
            raise UnsupportedError(f"{where}: config group {name} does not quantize weights, which is not read")
        form = group.get("format") or settings.get("format")
        yield Group(name, tuple(group["targets"]), _variant(weights, form, f"{where}: config group {name}"))


def _variant(weights: Mapping[str, Any], form: Any, where: str) -> str:
    """The name of the layout that QuantizationArgs describe. Raises UnsupportedError."""
    bits, kind = weights.get("num_bits"), weights.get("type", "int")
    size = weights.get("group_size")
    strategy = weights.get("strategy") or ("tensor" if size is None else "channel" if size == -1 else "group")
    reach = f"g{size}" if strategy in ("group", "tensor_group") else strategy
    asymmetric = not weights.get("symmetric", True)
    small = next((grid for grid, name in SMALL_FLOATS.items() if name == form), None)
    if small is not None:
        found = small
    elif kind == "float":
        found = f"fp8_e4m3-{reach}"
    else:
        found = f"int{bits}-{reach}{'-asym' if asymmetric else ''}"
        if form in ("int-quantized", "naive-quantized") and parse(found, tensor=True):
            found += PLAIN
    try:
        described = layout(found)
    except UnsupportedError as error:
        raise UnsupportedError(f"{where}: {error}") from None
    if weights.get("actorder") in ("group", "dynamic"):
        raise UnsupportedError(f"{where}: actorder {weights['actorder']} (g_idx) is not read")
    for key, value in described.arguments().items():
        if key not in IDLE and weights.get(key, value) != value:
            raise UnsupportedError(f"{where}: {key} {weights[key]!r} with format {form} is not read")
    if form not in (described.format, "naive-quantized"):
        raise UnsupportedError(f"{where}: format {form!r} is not read for {found.removesuffix(PLAIN)}")
    return found


def _shape(stored: Checkpoint, path: str, kind: Layout) -> tuple[int, int]:
    """The shape of a module: as its own tensor says where there is one, else by that of its codes."""
    names = set(stored.names())
    codes = next((name for name in (f"{path}.weight_packed", f"{path}.weight") if name in names), None)
    if codes is None:
        raise BadInputError(f"{stored.location}: {path} has a weight_scale and no weight")
    spec = stored.spec(codes)
    if f"{path}.weight_shape" in names:
        return _stated(stored, f"{path}.weight_shape")
    bits = {"U8": 8, "I8": 8, "F8_E4M3": 8, "I32": 32}.get(spec.dtype, 0)
    each = kind.arguments()["num_bits"] if codes.endswith("packed") else 8
    return spec.rows, spec.row_length * bits // each


def _stated(stored: Checkpoint, name: str) -> tuple[int, int]:
    spec = stored.spec(name)
    if spec.dtype not in ("I64", "I32") or spec.elements != 2:
        raise BadInputError(f"{stored.location}: {name} is {spec.dtype} {list(spec.shape)}, expected two integers")
    buffer = np.empty(spec.nbytes, dtype=np.uint8)
    stored.read_into(name, 0, spec.rows, buffer)
    high, wide = buffer.view("<i8" if spec.dtype == "I64" else "<i4").tolist()
    return int(high), int(wide)
