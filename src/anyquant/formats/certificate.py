"""The verdict inside the artifact: a few fields of fixed length, laid out before anything is measured, filled in last.

GGUF holds them as keys "anyquant.contract.NAME", a Hugging Face folder as the object "anyquant" in config.json.
"""

import hashlib
import math
import struct
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from anyquant.core.errors import BadInputError

KEY = "anyquant.contract."  # of GGUF
OBJECT = "anyquant"  # of config.json
STRING, UINT64, FLOAT64 = 8, 10, 12  # value types of GGUF
# bytes of the texts; one that does not fit ends with dots and a hash, the report has it whole
WIDTHS = {
    "status": 12,
    "limit": 160,
    "text_sha256": 64,
    "recipe_sha256": 64,
    "tensor_sha256": 64,
}
_MARK = 16  # hexadecimal digits of the sha256 of a text that does not fit


@dataclass(frozen=True)
class Certificate:
    """What was shown of an artifact, and of what exactly.

    `limit` is the contract as text; `mean_kl` in nats per token, with its one-sided 95 % bound, over `tokens` of
    `documents` whose ids hash to `text_sha256`; `recipe_sha256` and `tensor_sha256` name what was done and what came
    out.
    """

    status: str = "unmeasured"
    limit: str = ""
    mean_kl: float = math.nan
    mean_kl_upper: float = math.nan
    documents: int = 0
    tokens: int = 0
    text_sha256: str = ""
    recipe_sha256: str = ""
    tensor_sha256: str = ""

    @property
    def measured(self) -> bool:
        """Whether there is anything to reproduce."""
        return self.documents > 0 and math.isfinite(self.mean_kl)

    def fitted(self) -> "Certificate":
        """The same with texts as they fit: printable ASCII, no longer than their width.

        A text that loses anything ends with "..." and the first 16 digits of its sha256, so that no two look the same.
        """
        texts = {name: _fitting(getattr(self, name), width) for name, width in WIDTHS.items()}
        return Certificate(**{**asdict(self), **texts})

    def plain(self) -> dict[str, Any]:
        """As JSON holds it: null for what is not finite."""
        values = asdict(self.fitted())
        return {key: None if isinstance(v, float) and not math.isfinite(v) else v for key, v in values.items()}

    def sentence(self) -> str:
        """In one line, for people."""
        if not self.measured:
            return self.status
        asked = f"{self.limit}: " if self.limit else ""
        return (
            f"{self.status}; {asked}mean KL {self.mean_kl:.4g} nats, at most {self.mean_kl_upper:.4g} (95 % bound), "
            f"{self.documents} documents, {self.tokens:,} tokens"
        )


BLANK = Certificate()
# nothing is longer than this as JSON
WIDEST = Certificate(
    mean_kl=-2.2250738585072014e-308,
    mean_kl_upper=-2.2250738585072014e-308,
    documents=(1 << 63) - 1,
    tokens=(1 << 63) - 1,
    **{name: "x" * width for name, width in WIDTHS.items()},
)


def _fitting(text: str, width: int) -> str:
    safe = "".join(c if c.isascii() and c.isprintable() and c not in '"\\' else "?" for c in text)
    if safe == text and len(text) <= width:
        return text
    mark = "..." + hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()[:_MARK]
    return (safe[: max(width - len(mark), 0)] + mark)[:width]


def kinds() -> list[tuple[str, int]]:
    """(field, GGUF value type), in order."""
    return [
        (item.name, STRING if item.name in WIDTHS else UINT64 if item.type is int else FLOAT64)
        for item in fields(Certificate)
    ]


def stamp_gguf(header: bytes, certificate: Certificate) -> bytes:
    """A GGUF header with its certificate filled in, as many bytes as before.

    Of each key the first in the file is meant: ours stand in front of all that a model's own files supply.
    """
    data, values = bytearray(header), asdict(certificate.fitted())
    for name, kind in kinds():
        key = (KEY + name).encode()
        mark = struct.pack("<Q", len(key)) + key + struct.pack("<I", kind)
        start = data.index(mark) + len(mark)
        if kind == STRING:
            raw = struct.pack("<Q", WIDTHS[name]) + values[name].ljust(WIDTHS[name]).encode()
        else:
            raw = struct.pack("<Q" if kind == UINT64 else "<d", values[name])
        data[start : start + len(raw)] = raw
    return bytes(data)


def read_certificate(metadata: Mapping[str, Any], config: Mapping[str, Any], where: str) -> Certificate | None:
    """The certificate of an artifact, from GGUF's keys or from config.json; None where there is none.

    Raises BadInputError when what is there is none of ours.
    """
    found: Mapping[str, Any] | None = None
    if KEY + "status" in metadata:
        found = {name.removeprefix(KEY): value for name, value in metadata.items() if name.startswith(KEY)}
    elif OBJECT in config:
        found = config[OBJECT]
    if found is None:
        return None
    values: dict[str, Any] = {}
    for item in fields(Certificate):
        value = found.get(item.name) if isinstance(found, Mapping) else None
        if value is None and item.type is float:
            value = math.nan
        if item.type is float and type(value) is int:
            value = float(value)
        if type(value) is not item.type:
            raise BadInputError(f"{where}: its certificate has no sound {item.name}; it was not written by AnyQuant")
        values[item.name] = value.rstrip(" ") if isinstance(value, str) else value
    return Certificate(**values)
