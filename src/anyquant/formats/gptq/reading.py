"""What is found in a folder whose matrices lie packed along the input axis: from the headers, checked by the settings.

Bits and group size of a module follow from the shapes of its tensors, so patterns of the settings (`dynamic`) need not
be matched; where these say that some modules are symmetric and others are not, all are read as asymmetric, which holds
the same values.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from anyquant.core.checkpoint import Checkpoint, TensorSpec
from anyquant.core.errors import BadInputError, UnsupportedError
from anyquant.formats.folder.scheme import Found

QWEIGHT, QZEROS, SCALES, G_IDX = ".qweight", ".qzeros", ".scales", ".g_idx"
BITS = (2, 3, 4, 8)
GROUPS = (16, 32, 64, 128, 256)
VERSIONS = {"gptq": "1", "gptq_v2": "2"}


def settings_of(stored: Checkpoint) -> Mapping[str, Any]:
    """The quantization_config of a folder; {} without one. Raises BadInputError when it is no object."""
    settings = stored.config.get("quantization_config") or {}
    if not isinstance(settings, Mapping):
        raise BadInputError(f"{stored.location}: quantization_config is not an object")
    return settings


def find_modules(stored: Checkpoint) -> Mapping[str, Found]:
    """Path of every quantized module to the name of its layout and its shape.

    Raises BadInputError where settings and tensors contradict each other, UnsupportedError for what is not read.
    """
    settings, where = settings_of(stored), stored.location
    version, asymmetric = _version(settings, where), not all(_said(settings, "sym", where))
    flags = [version, "borrowing"] if version == "1" and asymmetric and _by_gptqmodel(settings) else [version]
    found, names = {}, set(stored.names())
    for path in quantized_paths(stored):
        reach, shape = measured(stored, path, set(_said(settings, "bits", where)), _said(settings, "group_size", where))
        end = ["order"] if path + G_IDX in names else ["bare"]
        found[path] = (":".join([named(stored, path, reach, asymmetric), *flags, *end]), shape)
    _check_listed(settings, list(found), where)
    return found


def quantized_paths(stored: Checkpoint) -> list[str]:
    """Modules with a qweight. Raises BadInputError where one has no scales or zero-points, or also a weight, and where
    there is none."""
    names, where = set(stored.names()), stored.location
    paths = sorted({name.removesuffix(end) for end in (QWEIGHT, QZEROS) for name in names if name.endswith(end)})
    for path in paths:
        for end in (QWEIGHT, SCALES, QZEROS):
            if path + end not in names:
                raise BadInputError(f"{where}: {path} has no {end[1:]}; the folder is damaged")
        if f"{path}.weight" in names:
            raise BadInputError(f"{where}: {path} has both a weight and a qweight")
    if not paths:
        raise BadInputError(f"{where}: its settings say that it is quantized, and no tensor is")
    return paths


def measured(
    stored: Checkpoint, path: str, bits: set[int], sizes: list[int], *, packed_outputs: bool = False
) -> tuple[str, tuple[int, int]]:
    """("int4-g128", (out, in)) of a module by the shapes of its tensors, where the settings allow them.

    `packed_outputs`: the codes lie packed along the outputs, not the inputs.

    Raises BadInputError for shapes that contradict the settings, UnsupportedError for groups that no grid has.
    """
    qweight, qzeros, scales = (_matrix(stored, path + end) for end in (QWEIGHT, QZEROS, SCALES))
    groups, rows = scales.shape
    width = 32 * qzeros.shape[1] // max(rows, 1)
    if width not in bits or 32 * qzeros.shape[1] != width * rows:
        said = " or ".join(map(str, sorted(bits)))
        raise BadInputError(
            f"{stored.location}: {path} holds zero-points of {32 * qzeros.shape[1] / max(rows, 1):g} bits, its "
            f"settings say {said}"
        )
    columns = qweight.shape[0] if packed_outputs else 32 * qweight.shape[0] // width
    return f"int{width}-{_reach(stored, path, columns, groups, sizes)}", (rows, columns)


def named(stored: Checkpoint, path: str, reach: str, asymmetric: bool) -> str:
    """The grid, and a flag for scales that are not float16: "int4-g128-asym-f16", "int4-g128:bf16"."""
    grid = f"{reach}-asym" if asymmetric else reach
    return f"{grid}:bf16" if stored.spec(path + SCALES).dtype == "BF16" else f"{grid}-f16"


def _reach(stored: Checkpoint, path: str, columns: int, groups: int, sizes: list[int]) -> str:
    where = f"{stored.location}: {path} has {groups} groups of {columns} inputs"
    if groups == 0 or columns % groups:
        raise UnsupportedError(f"{where}, which do not divide them; such a last group is not read")
    size = columns // groups
    if not any(size == one or (one == -1 and groups == 1) for one in sizes):
        raise BadInputError(f"{where}, its settings say groups of {' or '.join(map(str, sorted(set(sizes))))}")
    if groups == 1 and (-1 in sizes or size not in GROUPS):
        return "channel"
    if size not in GROUPS:
        raise UnsupportedError(f"{where}; groups of {size} are not read, but those of {', '.join(map(str, GROUPS))}")
    return f"g{size}"


def _matrix(stored: Checkpoint, name: str) -> TensorSpec:
    spec = stored.spec(name)
    if len(spec.shape) != 2:
        raise BadInputError(f"{stored.location}: {name} has shape {list(spec.shape)}, expected a matrix")
    return spec


def _version(settings: Mapping[str, Any], where: str) -> str:
    """Flag "1" or "2". Raises UnsupportedError for packings of other kernels."""
    form = settings.get("checkpoint_format") or settings.get("format") or "gptq"
    if settings.get("is_marlin_format"):
        form = "marlin"
    if not isinstance(form, str) or form not in VERSIONS:
        raise UnsupportedError(f"{where}: checkpoint_format {form!r} is not read; known: {', '.join(VERSIONS)}")
    if settings.get("pack_dtype") not in (None, "int32"):
        raise UnsupportedError(f"{where}: pack_dtype {settings['pack_dtype']!r} is not read, only int32")
    return VERSIONS[form]


def _said(settings: Mapping[str, Any], key: str, where: str) -> list[Any]:
    """What the settings say of `key`, for all modules and in patterns. Raises BadInputError for what it cannot be."""
    default = True if key == "sym" else None
    said = [settings.get(key, default), *(row[key] for row in _patterns(settings, where) if key in row)]
    for value in said:
        kind = bool if key == "sym" else int
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            raise BadInputError(f"{where}: quantization_config has {key} {value!r}, expected a {kind.__name__}")
        if key == "bits" and value not in BITS:
            raise UnsupportedError(f"{where}: {value} bits are not read; GPTQ has {', '.join(map(str, BITS))}")
    return said


def _patterns(settings: Mapping[str, Any], where: str) -> Iterator[Mapping[str, Any]]:
    table = settings.get("dynamic") or {}
    if not isinstance(table, Mapping):
        raise BadInputError(f"{where}: quantization_config has a dynamic that is no object")
    for pattern, row in table.items():
        if isinstance(row, Mapping) and not pattern.startswith("-:"):
            yield row


def _by_gptqmodel(settings: Mapping[str, Any]) -> bool:
    """Whether GPTQModel wrote the folder: its zero-points of 0 borrow from their neighbours."""
    meta = settings.get("meta")
    quantizers = meta.get("quantizer") if isinstance(meta, Mapping) else None
    listed = quantizers if isinstance(quantizers, list) else [quantizers]
    return any(isinstance(one, str) and one.startswith("gptqmodel") for one in listed)


def _check_listed(settings: Mapping[str, Any], paths: list[str], where: str) -> None:
    """Raise BadInputError where a listed module is not quantized, or none names one that is."""
    lists = settings.get("modules_in_block_to_quantize")
    if not lists:
        return
    if not isinstance(lists, list):
        raise BadInputError(f"{where}: modules_in_block_to_quantize is not a list")
    names = [name for one in lists for name in (one if isinstance(one, list) else [one])]
    for name in names:
        if not isinstance(name, str) or not any(path.endswith(name) for path in paths):
            raise BadInputError(
                f"{where}: modules_in_block_to_quantize names {name!r}, and no such module is quantized"
            )
    for path in paths:
        if "." in path and not any(path.endswith(name) for name in names):
            raise BadInputError(f"{where}: {path} is quantized, and modules_in_block_to_quantize does not name it")
