"""The contract: limits on what quantizing may cost, and how they are written."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from fractions import Fraction
from typing import Any

from anyquant.core.errors import UsageError
from anyquant.core.registry import suggest
from anyquant.evaluation.kl import TAIL_TOKENS

# mean KL of llama.cpp's q8_0, q6_K, q5_K_M, q4_K_M on Llama-3-8B, wikitext-2 (its perplexity README)
QUALITIES: Mapping[str, float] = {"lossless": 0.0014, "strict": 0.0055, "balanced": 0.011, "compact": 0.030}

# KL that is measured where nothing was quantized: the original's logits are kept as float16, and two runtimes sum in
# different orders, llama.cpp with a float16 cache. 5e-7 nats for the built-in model with float16 weights
NOISE_FLOOR = 1e-6
HIGHER, LOWER = "higher", "lower"
_METRIC = (
    "write module:function:higher or path/to/file.py:function:lower, or the name of an installed evaluator, "
    "NAME:higher, saying which direction is better"
)
_UNITS = " KMGT"
_MOST = 1 << 63  # no limit is as large, and no file has as many bytes


@dataclass(frozen=True)
class DropLimit:
    """How much worse a user's metric may become: by `amount`, or with `relative` by that share of |the original's|.

    `metric` is "module:function:higher" or "path/to/file.py:function:lower", or "NAME:higher" for an evaluator that a
    package registers; the last word says which is better.
    """

    metric: str
    amount: float
    relative: bool = False

    def __post_init__(self) -> None:
        place, function, direction = split_metric(self.metric)
        named = function and not place and self.metric.count(":") == 1
        if direction not in (HIGHER, LOWER) or not (named or (place and function.isidentifier())):
            raise UsageError(f"--max-drop {self.metric}: {_METRIC}")
        if not (math.isfinite(self.amount) and self.amount >= 0):
            raise UsageError(f"--max-drop {self.metric} is {self.amount}; give a finite number that is not negative")

    @property
    def text(self) -> str:
        """The limit as one writes it: "0.01" or "1%"."""
        return f"{self.amount * 100:.12g}%" if self.relative else f"{self.amount:.12g}"

    @classmethod
    def parse(cls, text: str) -> "DropLimit":
        """METRIC=X, X a number or a percentage: "metrics.py:accuracy:higher=1%". Raises UsageError."""
        metric, equals, amount = text.rpartition("=")
        relative = amount.endswith("%")
        try:
            number = float(amount.removesuffix("%")) / (100 if relative else 1)
        except ValueError:
            number = math.nan
        if not equals or math.isnan(number):
            raise UsageError(f"--max-drop {text}: expected METRIC=X, e.g. metrics.py:accuracy:higher=0.01 (or =1%)")
        return cls(metric, number, relative)


def split_metric(text: str) -> tuple[str, str, str]:
    """(module or file, function, direction) of a metric, ("", name, direction) of a registered evaluator.

    Empty where a piece is missing.
    """
    pieces = text.rsplit(":", 2)
    if len(pieces) == 2 and pieces[1] in (HIGHER, LOWER) and not pieces[0].endswith(".py"):
        return "", pieces[0], pieces[1]
    if len(pieces) < 3:
        return text, "", ""
    return pieces[0], pieces[1], pieces[2]


@dataclass(frozen=True)
class Contract:
    """Limits; None means no limit. KL in nats per token, `max_ppl_increase` relative (0.01 is 1 %).

    `min_same_top` is a share of 0 to 1. `max_size` counts the bytes of the artifact's files; `max_bpw` says the same as
    bits per weight, and becomes bytes when the model is known (`resolved`).
    """

    max_kl: float | None = None
    max_kl_99_9: float | None = None
    max_ppl_increase: float | None = None
    min_same_top: float | None = None
    max_size: int | None = None
    max_bpw: float | None = None
    max_drop: tuple[DropLimit, ...] = ()

    def __post_init__(self) -> None:
        for item in fields(self):
            value = getattr(self, item.name)
            if item.name != "max_drop" and value is not None and not 0 <= value < _MOST:
                raise UsageError(f"{_flag(item.name)} is {value}; give a finite number that is not negative")
        for name in ("max_kl", "max_kl_99_9"):
            if (value := getattr(self, name)) is not None and value < NOISE_FLOOR:
                raise UsageError(
                    f"{_flag(name)} is {value:g}, below what can be told from rounding noise in the logits themselves; "
                    f"the nearest limit that can be judged is {NOISE_FLOOR:g}"
                )
        if self.min_same_top is not None and self.min_same_top > 1:
            raise UsageError(f"--min-same-top is {self.min_same_top}; it is a share, give a number of 0 to 1")
        metrics = [limit.metric for limit in self.max_drop]
        if twice := next((metric for metric in metrics if metrics.count(metric) > 1), None):
            raise UsageError(f"--max-drop {twice} is given twice; keep one of them")

    @property
    def empty(self) -> bool:
        return not self.as_dict()

    @property
    def needs_measures(self) -> bool:
        """Whether any limit is about quality rather than size."""
        return bool(self.as_dict().keys() - {"max_size", "max_bpw"})

    @property
    def certify_tokens(self) -> int:
        """Tokens without which no verdict is possible: the far tail of the divergences needs many."""
        return 0 if self.max_kl_99_9 is None else TAIL_TOKENS

    def resolved(self, weights: int) -> "Contract":
        """With bits per weight as bytes, for a model whose matrices have `weights` weights; the smaller limit holds."""
        if self.max_bpw is None:
            return self
        size = math.floor(Fraction(self.max_bpw) * weights / 8)
        return replace(self, max_bpw=None, max_size=size if self.max_size is None else min(size, self.max_size))

    def as_dict(self) -> dict[str, Any]:
        """The limits that are set, as plain data; drops by metric, as one writes them."""
        found = {item.name: getattr(self, item.name) for item in fields(self) if item.name != "max_drop"}
        drops = {"max_drop": {limit.metric: limit.text for limit in self.max_drop}} if self.max_drop else {}
        return {**{name: value for name, value in found.items() if value is not None}, **drops}

    @classmethod
    def from_dict(cls, table: Mapping[str, Any]) -> "Contract":
        """Inverse of `as_dict`. Raises UsageError for anything else."""
        if not isinstance(table, Mapping):
            raise UsageError(f"not a contract: {table!r}")
        known = {item.name for item in fields(cls)}
        drops = table.get("max_drop", {})
        numbers = {name: value for name, value in table.items() if name != "max_drop"}
        if not (table.keys() <= known and isinstance(drops, Mapping)):
            raise UsageError(f"not a contract: {', '.join(map(str, table))}")
        if not all(isinstance(value, int | float) and not isinstance(value, bool) for value in numbers.values()):
            raise UsageError(f"not the limits of a contract: {numbers}")
        return cls(**numbers, max_drop=tuple(DropLimit.parse(f"{key}={value}") for key, value in drops.items()))

    def text(self) -> str:
        """All limits in one line: "max_kl=0.02 max_size=1000000"."""
        table = self.as_dict()
        drops = table.pop("max_drop", {})
        pairs = [
            f"{name}={value:.12g}" if isinstance(value, float) else f"{name}={value}" for name, value in table.items()
        ]
        return " ".join([*pairs, *(f"max_drop {metric}={amount}" for metric, amount in drops.items())])


def contract_for(quality: str) -> Contract:
    """The contract of a named quality. Raises UsageError for an unknown name."""
    return with_quality(Contract(), quality)


def with_quality(contract: Contract, quality: str | None) -> Contract:
    """Further limits beside those of a named quality, which is a mean KL. Raises UsageError when both say one."""
    if quality is None:
        return contract
    if quality not in QUALITIES:
        raise UsageError(f"unknown quality {quality!r}; {suggest(quality, list(QUALITIES))}")
    if contract.max_kl is not None:
        raise UsageError(
            f"--quality {quality} means --max-kl {QUALITIES[quality]:g}, and --max-kl {contract.max_kl:g} was given "
            "too; keep one of them"
        )
    return replace(contract, max_kl=QUALITIES[quality])


def size_limit(text: str) -> dict[str, Any]:
    """The field of a Contract that a size means: "4.6GB", "4.3GiB", "13200000B", "4.5bpw". Raises UsageError."""
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?) *(bpw|([KMGT]?)(i?)B)?", text.strip(), re.IGNORECASE)
    if match is None or (match[4] and not match[3]):
        raise UsageError(f"--max-size {text}: write bytes (13200000B, 4.6GB, 4.3GiB) or bits per weight (4.5bpw)")
    if (match[2] or "").lower() == "bpw":
        return {"max_bpw": float(match[1])}
    if not match[2] and float(match[1]) < 64:
        raise UsageError(f"--max-size {text}: which unit is meant: {text}GB, or {text}bpw?")
    if not match[3] and "." in match[1]:
        raise UsageError(f"--max-size {text}: bytes come whole; which unit is meant: {text}GB, or {text}bpw?")
    unit = (1024 if match[4] else 1000) ** _UNITS.index((match[3] or " ").upper())
    return {"max_size": math.floor(Fraction(match[1]) * unit)}


def _flag(name: str) -> str:
    return {"max_bpw": "--max-size (bits per weight)"}.get(name, "--" + name.replace("_", "-"))
