"""The types of llama.cpp's key-value cache: what may be asked for, what it costs, and when llama.cpp cannot do it.

`llama-server --cache-type-k` and `--cache-type-v` take the same names. A cache quantizes each head of a key or value by
itself, as it is written, and reads it back for every token after it. The numbers of a block are those of ggml.
"""

from dataclasses import dataclass

from anyquant.core.errors import UsageError
from anyquant.core.registry import suggest
from anyquant.store.ggml_types import GGML_TYPES_BY_NAME, GGMLType

CACHE_TYPES = ("f16", "bf16", "f32", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0")
DEFAULT = "f16"  # of llama.cpp, when nothing is said
KV_CACHE = "anyquant.kv_cache"  # GGUF key: the types that a file was made and judged for


@dataclass(frozen=True)
class CacheTypes:
    """One type for keys and one for values."""

    keys: str
    values: str

    @classmethod
    def parse(cls, text: str) -> "CacheTypes":
        """ "q8_0" for both, or "q8_0,q4_0" for keys, values. Raises UsageError with the nearest names."""
        parts = [part.strip().lower() for part in text.split(",")]
        if len(parts) > 2:
            raise UsageError(f"key-value cache {text!r}: give one type, or one for keys and one for values: q8_0,q4_0")
        for part in parts:
            if part not in CACHE_TYPES:
                raise UsageError(f"unknown type of the key-value cache {part!r}; {suggest(part, list(CACHE_TYPES))}")
        return cls(parts[0], parts[-1])

    def __str__(self) -> str:
        return self.keys if self.keys == self.values else f"{self.keys},{self.values}"

    @property
    def flash_attention(self) -> bool:
        """Whether llama.cpp can do it with flash attention only: without, it keeps values transposed."""
        return _type(self.values).block > 1

    def refuses(self, head_dim: int) -> list[str]:
        """Why llama.cpp cannot keep heads of this many elements."""
        return [
            f"a key-value cache of {name} takes heads in blocks of {_type(name).block}, the model's have {head_dim}; "
            "take f16, bf16 or f32"
            for name in dict.fromkeys((self.keys, self.values))
            if head_dim % _type(name).block
        ]

    def nbytes(self, width: int) -> int:
        """Bytes of the keys and values of one token in one block; `width` elements each (heads x their size)."""
        return sum(width // _type(name).block * _type(name).nbytes for name in (self.keys, self.values))


def _type(name: str) -> GGMLType:
    return GGML_TYPES_BY_NAME[name.upper()]


def cannot_tell(types: str) -> str:
    """The reason against a runtime without such an option."""
    return f"the type of the key-value cache ({types}) can be told to llama.cpp only; leave out --kv-cache"
