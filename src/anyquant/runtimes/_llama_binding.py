"""llama.cpp's C interface inside the pinned xllamacpp wheel, reached through ctypes.

The wheel's Python interface has no logits of a prompt, but its shared object exports the C symbols. Layouts are those
of `include/llama.h` and `ggml/include/ggml.h` at the release that the wheel holds (llama.cpp 0.6.0-dev, build 11549).
Parameter structures are handled as oversize opaque blobs: the x86-64 System V calling convention returns and passes a
structure of that size through memory, so the callee reads and writes only its own prefix. Their few fields that we set
are at the offsets below, and `load` checks that the defaults found there are the ones that llama.cpp documents.
"""

import ctypes
import functools
import importlib.metadata
import platform
import re
import struct
import sys
from collections import deque
from pathlib import Path
from typing import Any

from anyquant.core.errors import UnsupportedError
from anyquant.core.extras import require
from anyquant.runtimes.kv_cache import CACHE_TYPES
from anyquant.store.ggml_types import GGML_TYPES_BY_NAME

PIN = "2026.10.11549"

# llama_model_params
MODEL_GPU_LAYERS = 16  # int32, -1: all
MODEL_SPLIT_MODE = 20  # int32, 1: by layer
MODEL_LOAD_MODE = 24  # int32, -1: automatic, 0: read, 1: memory-map
MODEL_MAIN_GPU = 32  # int32
MODEL_BOOLS = 72  # vocab_only, check_tensors, use_extra_bufts, no_host, no_alloc, load_mtp
MODEL_CHECK_TENSORS = MODEL_BOOLS + 1

# llama_context_params
CONTEXT_SIZE = 0  # uint32 n_ctx
CONTEXT_BATCH = 4  # uint32 n_batch: most tokens of one llama_decode
CONTEXT_MICROBATCH = 8  # uint32 n_ubatch: tokens that are computed together
CONTEXT_SEQUENCES = 12  # uint32 n_seq_max
CONTEXT_THREADS = 28  # int32 n_threads, then n_threads_batch
CONTEXT_FLASH_ATTENTION = 52  # int32, -1: automatic, 0: off, 1: on
CONTEXT_CACHE_TYPES = 104  # int32 ggml_type of K, then of V

LOAD_READ, LOAD_MAP = 0, 1
CACHE_NUMBERS = {name: GGML_TYPES_BY_NAME[name.upper()].id for name in CACHE_TYPES}

DEBUG_LEVEL = 1  # GGML_LOG_LEVEL_DEBUG
ERROR_LEVEL = 4  # GGML_LOG_LEVEL_ERROR
CONTINUED_LEVEL = 5  # GGML_LOG_LEVEL_CONT: the rest of the line before
BLOB_BYTES = 1024


class Blob(ctypes.Structure):
    """A parameter structure of llama.cpp as bytes, larger than any of them."""

    _fields_ = (("raw", ctypes.c_uint8 * BLOB_BYTES),)

    def set(self, offset: int, form: str, *values: int) -> None:
        struct.pack_into("<" + form, self.raw, offset, *values)

    def get(self, offset: int, form: str) -> tuple[Any, ...]:
        return struct.unpack_from("<" + form, bytes(self.raw), offset)


class Batch(ctypes.Structure):
    """`llama_batch`: parallel arrays of n_tokens entries, allocated by llama_batch_init."""

    _fields_ = (
        ("n_tokens", ctypes.c_int32),
        ("token", ctypes.POINTER(ctypes.c_int32)),
        ("embd", ctypes.POINTER(ctypes.c_float)),
        ("pos", ctypes.POINTER(ctypes.c_int32)),
        ("n_seq_id", ctypes.POINTER(ctypes.c_int32)),
        ("seq_id", ctypes.POINTER(ctypes.POINTER(ctypes.c_int32))),
        ("logits", ctypes.POINTER(ctypes.c_int8)),
    )


_POINTER, _INT, _TEXT, _FLAG = ctypes.c_void_p, ctypes.c_int32, ctypes.c_char_p, ctypes.c_bool
_INTS = ctypes.POINTER(ctypes.c_int32)
_LOG = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)
# llama.cpp may call a log callback until the process ends, so none is ever freed
_CALLBACKS: list[Any] = []

# symbol -> (result, arguments)
SIGNATURES: dict[str, tuple[Any, list[Any]]] = {
    "llama_version": (_TEXT, []),
    "llama_log_set": (None, [_LOG, _POINTER]),
    "llama_backend_init": (None, []),
    "llama_model_default_params": (Blob, []),
    "llama_context_default_params": (Blob, []),
    "llama_model_load_from_file": (_POINTER, [_TEXT, Blob]),
    "llama_model_free": (None, [_POINTER]),
    "llama_model_get_vocab": (_POINTER, [_POINTER]),
    "llama_model_n_ctx_train": (_INT, [_POINTER]),
    "llama_model_has_decoder": (_FLAG, [_POINTER]),
    "llama_model_has_encoder": (_FLAG, [_POINTER]),
    "llama_init_from_model": (_POINTER, [_POINTER, Blob]),
    "llama_free": (None, [_POINTER]),
    "llama_n_ctx": (ctypes.c_uint32, [_POINTER]),
    "llama_n_batch": (ctypes.c_uint32, [_POINTER]),
    "llama_n_ubatch": (ctypes.c_uint32, [_POINTER]),
    "llama_n_threads": (_INT, [_POINTER]),
    "llama_get_memory": (_POINTER, [_POINTER]),
    "llama_memory_clear": (None, [_POINTER, _FLAG]),
    "llama_batch_init": (Batch, [_INT, _INT, _INT]),
    "llama_batch_free": (None, [Batch]),
    "llama_decode": (_INT, [_POINTER, Batch]),
    "llama_get_logits": (ctypes.POINTER(ctypes.c_float), [_POINTER]),
    "llama_vocab_n_tokens": (_INT, [_POINTER]),
    "llama_vocab_is_eog": (_FLAG, [_POINTER, _INT]),
    "llama_tokenize": (_INT, [_POINTER, _TEXT, _INT, _INTS, _INT, _FLAG, _FLAG]),
    "llama_detokenize": (_INT, [_POINTER, _INTS, _INT, ctypes.c_char_p, _INT, _FLAG, _FLAG]),
    "llama_token_to_piece": (_INT, [_POINTER, _INT, ctypes.c_char_p, _INT, _INT, _FLAG]),
    "ggml_type_size": (ctypes.c_size_t, [ctypes.c_int]),
    "ggml_blck_size": (ctypes.c_int64, [ctypes.c_int]),
    "ggml_type_name": (_TEXT, [ctypes.c_int]),
}


class Log:
    """The last lines that llama.cpp would have printed, since `clear`."""

    def __init__(self) -> None:
        self._lines: deque[tuple[int, str]] = deque(maxlen=2000)

    def clear(self) -> None:
        self._lines.clear()

    def receive(self, level: int, text: bytes | None, _data: int | None) -> None:
        if level == DEBUG_LEVEL:
            return
        words = (text or b"").decode("utf-8", "replace")
        if level == CONTINUED_LEVEL and self._lines:
            before, start = self._lines.pop()
            self._lines.append((before, start + words))
        else:
            self._lines.append((level, words))

    def lines(self) -> list[str]:
        return [text.strip() for _, text in self._lines]

    def buffers(self) -> dict[str, int]:
        """Bytes of the "... buffer size = X MiB" lines, summed by kind: model, KV, compute, output."""
        totals = {"model": 0, "KV": 0, "compute": 0, "output": 0}
        for line in self.lines():
            match = re.search(r"(model|KV|compute|output) buffer size =\s+([\d.]+) MiB", line)
            if match:
                totals[match[1]] += round(float(match[2]) * (1 << 20))
        return totals

    def reason(self) -> str:
        """llama.cpp's own words about the last failure: its first error line, which is the most specific one."""
        errors = [text.strip() for level, text in self._lines if level == ERROR_LEVEL and text.strip()]
        return re.sub(r"^\w+: (error loading model: )*", "", errors[0]) if errors else "llama.cpp gave no reason"


class Library:
    """The loaded shared object. `log` receives all of llama.cpp's messages; nothing is printed."""

    def __init__(self, shared: ctypes.CDLL) -> None:
        self.c: Any = shared
        self.log = Log()
        callback = _LOG(self.log.receive)
        _CALLBACKS.append(callback)
        self.c.llama_log_set(callback, None)
        self.c.llama_backend_init()


def refusal() -> str | None:
    """Why llama.cpp cannot be used on this machine, or None. Does not load the library.

    Raises MissingExtraError when xllamacpp is not installed.
    """
    if platform.machine() != "x86_64" or sys.platform not in ("linux", "darwin"):
        return f"the llama.cpp binding is verified on x86-64 Linux and macOS only, this is {platform.platform()}"
    try:
        found = importlib.metadata.version("xllamacpp")
    except importlib.metadata.PackageNotFoundError:
        require("xllamacpp")
        return "xllamacpp has no package metadata; run: pip install --force-reinstall xllamacpp==" + PIN
    if found != PIN:
        return f"xllamacpp is {found}, AnyQuant needs exactly {PIN}; run: pip install xllamacpp=={PIN}"
    return None


@functools.cache
def load() -> Library:
    """The library, loaded and checked once per process.

    Raises UnsupportedError when the version is not the pinned one or the self-test fails, MissingExtraError when
    xllamacpp is not installed.
    """
    reason = refusal()
    if reason is not None:
        raise UnsupportedError(reason)
    module = require("xllamacpp")
    candidates = sorted(Path(str(module.__file__)).parent.glob("*.so"))
    if not candidates:
        raise UnsupportedError(f"xllamacpp {PIN} holds no shared object; reinstall it: pip install xllamacpp=={PIN}")
    shared = ctypes.CDLL(str(candidates[0]))
    for name, (result, arguments) in SIGNATURES.items():
        try:
            function = getattr(shared, name)
        except AttributeError:
            raise UnsupportedError(f"xllamacpp {PIN} does not export {name}; reinstall that version") from None
        function.restype, function.argtypes = result, arguments
    wrong = self_test(shared)
    if wrong:
        raise UnsupportedError(f"xllamacpp {PIN}: the memory layout is not the expected one ({'; '.join(wrong)})")
    return Library(shared)


def self_test(shared: Any) -> list[str]:
    """Every difference between the layouts above and what the library returns. Empty when all is as expected."""
    model, context = shared.llama_model_default_params(), shared.llama_context_default_params()
    expectations: list[tuple[str, object, object]] = [
        ("default GPU layers, split and load mode", model.get(MODEL_GPU_LAYERS, "3i"), (-1, 1, -1)),
        ("default model flags", model.get(MODEL_BOOLS, "6B"), (0, 0, 1, 0, 0, 0)),
        ("default context and batch sizes", context.get(CONTEXT_SIZE, "4I"), (512, 2048, 512, 1)),
        ("default threads", context.get(CONTEXT_THREADS, "2i"), (4, 4)),
        ("default rope, pooling, attention, flash types", context.get(40, "4i"), (-1, -1, -1, -1)),
        ("default YaRN factors", context.get(64, "4f"), (-1.0, -1.0, -1.0, -1.0)),
        ("default cache types", context.get(CONTEXT_CACHE_TYPES, "2i"), (1, 1)),
        ("Q4_K block", (shared.ggml_blck_size(12), shared.ggml_type_size(12)), (256, 144)),
    ]
    for name, number in CACHE_NUMBERS.items():
        expectations.append((f"name of type {number}", shared.ggml_type_name(number), name.encode()))
    batch = shared.llama_batch_init(4, 0, 1)
    pointers = tuple(bool(getattr(batch, name)) for name, _ in Batch._fields_[1:])
    expectations.append(("batch of tokens", (batch.n_tokens, *pointers), (0, True, False, True, True, True, True)))
    shared.llama_batch_free(batch)
    return [f"{what}: {found}, not {wanted}" for what, found, wanted in expectations if found != wanted]
