"""Recipe: what to do, as data. A TOML file and the flags of the command line become the same frozen object."""

import fnmatch
import hashlib
import json
import math
import tomllib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from anyquant.calibrate.sources import FIELD, LEAST_CONTEXT, require_source
from anyquant.core.arithmetic import DTYPES
from anyquant.core.errors import BadInputError, UsageError
from anyquant.core.linear import Linear, Role
from anyquant.core.registry import suggest
from anyquant.runtimes.kv_cache import CacheTypes

SCHEMA = 1
MAXIMUM_BYTES = 1 << 20
LEAST_TOKENS = 256


@dataclass(frozen=True)
class Rule:
    """Linears that match all given conditions take the grid and algorithm. Later rules win.

    `role` is a Role or "" for any; `pattern` a shell pattern over Linear names ("blocks.*.attn_v"); `blocks` a range
    (first, last), both included.
    """

    role: str = ""
    pattern: str = ""
    blocks: tuple[int, int] | None = None
    grid: str | None = None
    algorithm: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)

    def matches(self, linear: Linear) -> bool:
        if self.role and linear.role != self.role:
            return False
        if self.pattern and not fnmatch.fnmatchcase(linear.name, self.pattern):
            return False
        if self.blocks is not None:
            return linear.block is not None and self.blocks[0] <= linear.block <= self.blocks[1]
        return True

    def describe(self) -> str:
        """The conditions, for messages and reasons."""
        given = {"role": self.role, "pattern": self.pattern, "blocks": self.blocks}
        return "rule " + (", ".join(f"{key}={value}" for key, value in given.items() if value) or "for everything")


@dataclass(frozen=True)
class Calibration:
    """`data_free` turns statistics off. `tokens` bounds the calibration text, `context` is the window length.

    `text` is a path or the name of a data set (see `calibrate.sources`), `field` the one of its records that counts.
    `dtype` is what the blocks compute in meanwhile (see `core.arithmetic`).
    `imatrix` is a llama.cpp importance file to use instead of collecting statistics; `keep_imatrix` puts what was
    collected into the output as such a file.
    """

    data_free: bool = False
    text: str | None = None
    tokens: int = 65_536
    context: int = 512
    imatrix: str | None = None
    keep_imatrix: bool = False
    field: str = FIELD
    dtype: str = DTYPES[0]


@dataclass(frozen=True)
class Recipe:
    """Base choice (`preset` of the format, or `grid` for block Linears), then ordered rules.

    `algorithm` is a chain ("rotate -> awq -> gptq"), `options` are those of its steps; None is rounding, which a search
    under a contract may exchange for more where it pays. `activations` names the grid on
    which the inputs of the block Linears are rounded while the model runs, each token for itself ("int8-channel"), or
    with one calibrated scale ("int8-tensor:static"). `kv_cache` are the types of the key-value cache with which the
    artifact will run and is judged, "q8_0" or "q8_0,q4_0" (keys, values); None: the runtime's default. `pins` are for a
    search under a contract: a role or a pattern of Linears, and the grid that it must not change.
    """

    preset: str | None = None
    grid: str | None = None
    algorithm: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    embedding: str | None = None
    head: str | None = None
    activations: str | None = None
    kv_cache: str | None = None
    rules: tuple[Rule, ...] = ()
    pins: Mapping[str, str] = field(default_factory=dict)
    calibration: Calibration = Calibration()

    @property
    def pinned(self) -> tuple[Rule, ...]:
        """What a search must leave as it is, as rules: pins, and the grids of embedding and head."""
        named = {Role.EMBEDDING.value: self.embedding, Role.HEAD.value: self.head}
        pins = {**{name: grid for name, grid in named.items() if grid is not None}, **self.pins}
        roles = {role.value for role in Role}
        return tuple(
            Rule(role=name, grid=grid) if name in roles else Rule(pattern=name, grid=grid)
            for name, grid in pins.items()
        )

    @property
    def chain(self) -> str:
        """The algorithm, by name even where none is asked for."""
        return self.algorithm or "rtn"

    def as_dict(self) -> dict[str, Any]:
        """Plain data, JSON-ready."""
        return {"version": SCHEMA, **asdict(self)}

    def digest(self) -> str:
        """sha256 of the canonical JSON: the identity of the job."""
        return hashlib.sha256(json.dumps(self.as_dict(), sort_keys=True).encode()).hexdigest()


def _known(table: Mapping[str, Any], allowed: set[str], where: str) -> None:
    for key in table:
        if key not in allowed:
            raise UsageError(f"{where}: unknown key {key!r}; {suggest(key, sorted(allowed))}")


def _typed(table: Mapping[str, Any], key: str, kind: type, where: str) -> Any:
    value = table.get(key)
    if value is not None and (not isinstance(value, kind) or (kind is int and isinstance(value, bool))):
        raise UsageError(f"{where}: {key} is {value!r}, expected {kind.__name__}")
    return value


def _options(table: Mapping[str, Any], where: str) -> Mapping[str, Any]:
    options: Mapping[str, Any] = _typed(table, "options", dict, where) or {}
    for key, value in options.items():
        # they are hashed and reported as JSON, which has neither dates nor infinities
        if not isinstance(value, str | int | float) or (isinstance(value, float) and not math.isfinite(value)):
            raise UsageError(f"{where}: option {key} is {value!r}, expected a text, a finite number, true or false")
    return options


def _range(table: Mapping[str, Any], where: str) -> tuple[int, int] | None:
    blocks = _typed(table, "blocks", list, where)
    if blocks is None:
        return None
    if len(blocks) != 2 or not all(type(block) is int for block in blocks) or not 0 <= blocks[0] <= blocks[1]:
        raise UsageError(f"{where}: blocks is {blocks!r}, expected [first, last], counted from 0")
    return blocks[0], blocks[1]


def _rule(table: Any, index: int) -> Rule:
    where = f"rule {index}"
    if not isinstance(table, dict):
        raise UsageError(f"{where}: expected a table, [[rule]]")
    _known(table, {"role", "pattern", "blocks", "grid", "algorithm", "options"}, where)
    role = _typed(table, "role", str, where) or ""
    if role and role not in list(Role):
        raise UsageError(f"{where}: unknown role {role!r}; {suggest(role, [str(r) for r in Role])}")
    grid, algorithm = _typed(table, "grid", str, where), _typed(table, "algorithm", str, where)
    if grid is None and algorithm is None and not table.get("options"):
        raise UsageError(f"{where}: names neither a grid nor an algorithm, and no options")
    return Rule(
        role=role,
        pattern=_typed(table, "pattern", str, where) or "",
        blocks=_range(table, where),
        grid=grid,
        algorithm=algorithm,
        options=_options(table, where),
    )


def _calibration(table: Mapping[str, Any]) -> Calibration:
    where = "calibration"
    _known(table, {"data_free", "text", "field", "tokens", "context", "imatrix", "keep_imatrix", "dtype"}, where)
    default = Calibration()
    tokens, context = _typed(table, "tokens", int, where), _typed(table, "context", int, where)
    for key, value, least in (("tokens", tokens, LEAST_TOKENS), ("context", context, LEAST_CONTEXT)):
        if value is not None and value < least:
            raise UsageError(f"{where}: {key} is {value}, expected at least {least}")
    if table.get("data_free") and table.get("imatrix") is not None:
        raise UsageError(f"{where}: data_free and imatrix exclude each other")
    dtype = _typed(table, "dtype", str, where) or default.dtype
    if dtype not in DTYPES:
        raise UsageError(f"{where}: dtype is {dtype!r}, expected {' or '.join(DTYPES)}")
    return Calibration(
        data_free=bool(_typed(table, "data_free", bool, where)),
        text=_typed(table, "text", str, where),
        tokens=default.tokens if tokens is None else tokens,
        context=default.context if context is None else context,
        imatrix=_typed(table, "imatrix", str, where),
        keep_imatrix=bool(_typed(table, "keep_imatrix", bool, where)),
        field=_typed(table, "field", str, where) or default.field,
        dtype=dtype,
    )


def _pins(table: Mapping[str, Any]) -> Mapping[str, str]:
    for name, grid in table.items():
        if not isinstance(grid, str):
            raise UsageError(f"recipe: pins: {name} is {grid!r}; give the name of a grid")
    return dict(table)


def parse_recipe(table: Mapping[str, Any]) -> Recipe:
    """A recipe from parsed TOML. Raises UsageError naming the key that is wrong."""
    _known(
        table,
        {
            "version",
            "preset",
            "grid",
            "algorithm",
            "options",
            "embedding",
            "head",
            "activations",
            "kv_cache",
            "rule",
            "pins",
            "calibration",
        },
        "recipe",
    )
    if type(table.get("version")) is not int or table["version"] != SCHEMA:
        raise UsageError(f"recipe: version is {table.get('version')!r}, this AnyQuant reads version {SCHEMA}")
    rules = _typed(table, "rule", list, "recipe") or []
    recipe = Recipe(
        preset=_typed(table, "preset", str, "recipe"),
        grid=_typed(table, "grid", str, "recipe"),
        algorithm=_typed(table, "algorithm", str, "recipe"),
        options=_options(table, "recipe"),
        embedding=_typed(table, "embedding", str, "recipe"),
        head=_typed(table, "head", str, "recipe"),
        activations=_typed(table, "activations", str, "recipe"),
        kv_cache=_typed(table, "kv_cache", str, "recipe"),
        rules=tuple(_rule(rule, index) for index, rule in enumerate(rules)),
        pins=_pins(_typed(table, "pins", dict, "recipe") or {}),
        calibration=_calibration(_typed(table, "calibration", dict, "recipe") or {}),
    )
    if recipe.preset is not None and recipe.grid is not None:
        raise UsageError("recipe: give preset or grid, not both")
    return recipe


def load_recipe(path: Path) -> Recipe:
    """Read a recipe file. Raises BadInputError when it is not TOML, UsageError when it says something unknown."""
    try:
        with path.open("rb") as file:
            text = file.read(MAXIMUM_BYTES + 1)
    except OSError as error:
        raise BadInputError(f"cannot read the recipe {path}: {error.strerror}") from None
    if len(text) > MAXIMUM_BYTES:
        raise BadInputError(f"the recipe {path} is larger than {MAXIMUM_BYTES} bytes")
    try:
        table = tomllib.loads(text.decode("utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise BadInputError(f"the recipe {path} is not TOML: {error}") from None
    try:
        return parse_recipe(table)
    except UsageError as error:
        raise UsageError(f"{path}: {error}") from None


def chosen(recipe: Recipe, preset: str | None, grid: str | None) -> Recipe:
    """The recipe with another base choice, where one is given. Raises UsageError when both are."""
    if preset is not None and grid is not None:
        raise UsageError("give --preset or --grid, not both")
    return recipe if preset is None and grid is None else replace(recipe, preset=preset, grid=grid)


def canonical(recipe: Recipe) -> Recipe:
    """Names as they are registered: grids in lower, presets in upper case.

    Raises BadInputError for a text or importance file that is not there, UsageError for a malformed name of a data set,
    an unknown type of the key-value cache, and when importance that is not collected is to be kept.
    """
    calibration = recipe.calibration
    if calibration.keep_imatrix and (calibration.data_free or calibration.imatrix is not None):
        other = "--data-free" if calibration.data_free else "--imatrix"
        raise UsageError(f"--keep-imatrix keeps what is collected, and with {other} nothing is; leave out one of them")
    if calibration.dtype != Calibration().dtype and (calibration.data_free or calibration.imatrix is not None):
        raise UsageError("--calibration-dtype says how to calibrate, and here nothing is calibrated; leave it out")
    if calibration.text is not None:
        require_source(calibration.text)
    if calibration.imatrix is not None and not Path(calibration.imatrix).exists():
        raise BadInputError(f"the imatrix {calibration.imatrix} does not exist")

    def lower(name: str | None) -> str | None:
        return None if name is None else name.lower()

    return replace(
        recipe,
        preset=None if recipe.preset is None else recipe.preset.upper(),
        grid=lower(recipe.grid),
        embedding=lower(recipe.embedding),
        head=lower(recipe.head),
        activations=lower(recipe.activations),
        kv_cache=None if recipe.kv_cache is None else str(CacheTypes.parse(recipe.kv_cache)),
        rules=tuple(replace(rule, grid=lower(rule.grid)) for rule in recipe.rules),
        pins={name: grid.lower() for name, grid in recipe.pins.items()},
    )
