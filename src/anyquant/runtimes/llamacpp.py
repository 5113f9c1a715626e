"""llama.cpp as a runtime: the pinned xllamacpp wheel, through its C interface.

For exact comparisons flash attention is off and the key-value cache is float32 unless asked otherwise. On a tiny
float32 Llama with peaked attention the mean KL to `transformers` is 1e-10 so, but 7e-6 with llama.cpp's own default, a
float16 cache, and 4e-4 with bfloat16: the cache alone would use up a conversion limit of 1e-5.
"""

import codecs
import ctypes
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Self

import numpy as np
import numpy.typing as npt

from anyquant.core.errors import AnyQuantError, BadInputError, UnsupportedError, UsageError
from anyquant.runtimes import _llama_binding as binding
from anyquant.runtimes.base import Logits, Memory, cores, sample
from anyquant.runtimes.kv_cache import DEFAULT, CacheTypes

# bytes of one output buffer: bounds memory for vocabularies of 100 000 tokens and more
OUTPUT_BYTES = 1 << 26
# refusals of a sound file, by the words that llama.cpp uses
UNSUPPORTED = (
    "unknown model architecture",
    "unknown pre-tokenizer",
    "unknown tokenizer",
    "unsupported",
    "not supported",
)


@dataclass(frozen=True)
class Options:
    """`cache`: types of the key-value cache, as CacheTypes reads them. `map_file` maps the file, else it is read.

    `check_tensors` makes llama.cpp look for NaN, infinities and broken blocks while it loads.
    """

    cache: str = "f32"
    map_file: bool = True
    check_tensors: bool = False


class LlamaCpp:
    """One GGUF file opened in llama.cpp, with one sequence at a time. Free it with `close` or a `with` block."""

    def __init__(
        self, library: binding.Library, model: int, context: int, batch: binding.Batch, batch_size: int
    ) -> None:
        """Takes over the handles; use `open`."""
        self._library = library
        self._c = library.c
        self._model: int | None = model
        self._context: int | None = context
        self._batch = batch
        self._batch_size = batch_size
        self._tokens = np.ctypeslib.as_array(batch.token, shape=(batch_size,))
        self._positions = np.ctypeslib.as_array(batch.pos, shape=(batch_size,))
        self._wanted = np.ctypeslib.as_array(batch.logits, shape=(batch_size,))
        self._position = 0
        buffers = library.log.buffers()
        self._memory = Memory(buffers["model"], buffers["KV"], buffers["compute"] + buffers["output"])

    @classmethod
    def open(
        cls, path: Path, context: int = 512, threads: int | None = None, options: Options | None = None
    ) -> "LlamaCpp":
        """Load a GGUF file for sequences of up to `context` tokens, on `threads` threads (None: every core allowed).

        `context` may exceed what the model was trained for. Raises BadInputError for a missing or damaged file,
        UnsupportedError with llama.cpp's own words for a file that it does not take, UsageError for wrong numbers.
        """
        options = options or Options()
        if context < 1:
            raise UsageError(f"context is {context} tokens; give at least 1")
        CacheTypes.parse(options.cache)
        _expect_gguf(path)
        library = binding.load()
        library.log.clear()
        model = _load_model(library, path, options)
        try:
            return cls._with_context(library, model, context, threads or cores(), options)
        except BaseException:
            library.c.llama_model_free(model)
            raise

    @classmethod
    def _with_context(
        cls, library: binding.Library, model: int, size: int, threads: int, options: Options
    ) -> "LlamaCpp":
        c = library.c
        if c.llama_model_has_encoder(model) or not c.llama_model_has_decoder(model):
            raise UnsupportedError("this GGUF holds an encoder; only decoder models have next-token logits")
        vocabulary = c.llama_vocab_n_tokens(c.llama_model_get_vocab(model))
        batch_size = max(1, min(size, 512, OUTPUT_BYTES // (4 * max(1, vocabulary))))
        cache = CacheTypes.parse(options.cache)
        params = c.llama_context_default_params()
        params.set(binding.CONTEXT_SIZE, "3I", size, batch_size, batch_size)
        params.set(binding.CONTEXT_THREADS, "2i", threads, threads)
        # the flash-attention kernel sums in float16 where V is float16; a quantized V cache exists only there
        params.set(binding.CONTEXT_FLASH_ATTENTION, "i", int(cache.flash_attention))
        numbers = binding.CACHE_NUMBERS
        params.set(binding.CONTEXT_CACHE_TYPES, "2i", numbers[cache.keys], numbers[cache.values])
        context = c.llama_init_from_model(model, params)
        if not context:
            raise UnsupportedError(f"llama.cpp cannot make a context of {size} tokens: {library.log.reason()}")
        try:
            _expect_settings(library, context, (size, batch_size, threads), cache)
        except BaseException:
            c.llama_free(context)
            raise
        batch = c.llama_batch_init(batch_size, 0, 1)
        for index in range(batch_size):
            batch.n_seq_id[index] = 1
            batch.seq_id[index][0] = 0
        return cls(library, model, context, batch, batch_size)

    def close(self) -> None:
        """Free model and context. Closing twice is allowed."""
        if self._context is not None:
            self._c.llama_batch_free(self._batch)
            self._c.llama_free(self._context)
            self._context = None
        if self._model is not None:
            self._c.llama_model_free(self._model)
            self._model = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *failure: object) -> None:
        self.close()

    @property
    def _handle(self) -> int:
        if self._context is None:
            raise UsageError("this llama.cpp model is closed; open it again")
        return self._context

    @property
    def _vocab(self) -> int:
        return int(self._handle and self._c.llama_model_get_vocab(self._model))

    @cached_property
    def vocabulary(self) -> int:
        """Number of token ids."""
        return int(self._c.llama_vocab_n_tokens(self._vocab))

    @cached_property
    def context(self) -> int:
        """Most tokens that one sequence can hold (llama.cpp rounds the request up to a multiple of 256)."""
        return int(self._c.llama_n_ctx(self._handle))

    @cached_property
    def trained_context(self) -> int:
        """Tokens that the model says it was trained for."""
        return int(self._handle and self._c.llama_model_n_ctx_train(self._model))

    @property
    def memory(self) -> Memory:
        """Buffer sizes that llama.cpp reported at load, to 0.01 MiB. Mapped weights count in full."""
        return self._memory

    def tokenize(self, text: str, add_special: bool = True, parse_special: bool = False) -> list[int]:
        """Token ids of `text`. `add_special` adds BOS or EOS as the file's metadata asks, `parse_special` reads the
        text of control tokens as those tokens."""
        raw = text.encode("utf-8")
        capacity = len(raw) + 8
        vocab = self._vocab
        for _ in range(2):
            ids = (ctypes.c_int32 * capacity)()
            count = self._c.llama_tokenize(vocab, raw, len(raw), ids, capacity, add_special, parse_special)
            if count >= 0:
                return list(ids[:count])
            capacity = -count
        raise AnyQuantError(f"llama.cpp could not tokenize a text of {len(raw)} bytes")

    def detokenize(self, ids: Sequence[int], special: bool = False) -> str:
        """Text of `ids`; control tokens are left out unless `special`."""
        array = (ctypes.c_int32 * len(ids))(*self._checked(ids).tolist())
        capacity = 16 * len(ids) + 16
        for _ in range(2):
            text = ctypes.create_string_buffer(capacity)
            size = self._c.llama_detokenize(self._vocab, array, len(ids), text, capacity, not special, special)
            if size >= 0:
                return text.raw[:size].decode("utf-8", "replace")
            capacity = -size
        raise AnyQuantError(f"llama.cpp could not turn {len(ids)} tokens into text")

    def logits(self, tokens: Sequence[int]) -> Logits:
        """Logits after every position of `tokens` as a fresh sequence: float32 (tokens, vocabulary).

        Raises UsageError when they do not fit the context or an id is not in the vocabulary.
        """
        ids = self._checked(tokens)
        self.clear()
        result = np.empty((len(ids), self.vocabulary), dtype=np.float32)
        for start in range(0, len(ids), self._batch_size):
            part = ids[start : start + self._batch_size]
            result[start : start + len(part)] = self._run(part, every=True)
        return result

    def clear(self) -> None:
        """Forget the current sequence."""
        self._c.llama_memory_clear(self._c.llama_get_memory(self._handle), True)
        self._position = 0

    def decode(self, tokens: Sequence[int]) -> Logits:
        """Append `tokens` to the current sequence; logits after the last one, float32 (vocabulary,)."""
        ids = self._checked(tokens)
        if len(ids) == 0:
            raise UsageError("no tokens to decode; give at least one")
        for start in range(0, len(ids), self._batch_size):
            last = self._run(ids[start : start + self._batch_size], every=False)
        final: Logits = last[0].copy()
        return final

    def step(self, token: int) -> Logits:
        """Append one token; logits after it, float32 (vocabulary,)."""
        return self.decode([token])

    def ends(self, token: int) -> bool:
        """Whether the token ends a generation (EOS, end of turn)."""
        return bool(self._handle and self._c.llama_vocab_is_eog(self._vocab, token))

    def generate(self, prompt: str, tokens: int, temperature: float = 0.0, seed: int = 0) -> Iterator[str]:
        """Continue `prompt` by at most `tokens` tokens, piece by piece; ends early at EOS or when the context is full.

        Temperature 0 takes the most likely token, otherwise tokens are drawn from softmax(logits / temperature).
        """
        if tokens < 0 or temperature < 0:
            raise UsageError(f"tokens is {tokens} and temperature {temperature}; neither may be negative")
        ids = self.tokenize(prompt, parse_special=True)
        if not ids:
            raise UsageError("the prompt is empty and this model has no begin token; give some text")
        return self._continue(ids, tokens, temperature, np.random.default_rng(seed))

    def _continue(self, ids: list[int], tokens: int, temperature: float, random: np.random.Generator) -> Iterator[str]:
        # a character may span tokens: bytes are held back until it is complete
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self.clear()
        logits = self.decode(ids)
        for produced in range(tokens):
            token = sample(logits, temperature, random)
            if self.ends(token):
                break
            piece = decoder.decode(self._piece(token))
            if piece:
                yield piece
            if produced + 1 == tokens or self._position == self.context:
                break
            logits = self.step(token)
        rest = decoder.decode(b"", final=True)
        if rest:
            yield rest

    def _piece(self, token: int) -> bytes:
        """Bytes of one token; nothing for a control token."""
        capacity = 64
        for _ in range(2):
            text = ctypes.create_string_buffer(capacity)
            size = self._c.llama_token_to_piece(self._vocab, token, text, capacity, 0, False)
            if size >= 0:
                return text.raw[:size]
            capacity = -size
        raise AnyQuantError(f"llama.cpp has no text for token {token}")

    def _checked(self, tokens: Sequence[int]) -> npt.NDArray[np.int32]:
        """`tokens` as int32, all of them known ids. Raises UsageError otherwise."""
        ids = np.asarray(tokens, dtype=np.int64).reshape(-1)
        unknown = np.flatnonzero((ids < 0) | (ids >= self.vocabulary))
        if len(unknown):
            place = int(unknown[0])
            raise UsageError(f"token {ids[place]} at position {place} is not in the vocabulary of {self.vocabulary}")
        return ids.astype(np.int32)

    def _run(self, ids: npt.NDArray[np.int32], every: bool) -> Logits:
        """Decode one batch at the current position. The result, (len(ids) or 1, vocabulary), is llama.cpp's buffer."""
        handle, count, total = self._handle, len(ids), self._position + len(ids)
        if total > self.context:
            raise UsageError(f"{total} tokens do not fit the context of {self.context}; open it with a larger context")
        self._tokens[:count] = ids
        self._positions[:count] = np.arange(self._position, total)
        self._wanted[:count] = every
        self._wanted[count - 1] = 1
        self._batch.n_tokens = count
        self._library.log.clear()
        status = self._c.llama_decode(handle, self._batch)
        if status != 0:
            raise AnyQuantError(f"llama.cpp failed on a batch of {count} tokens: {self._library.log.reason()}")
        self._position = total
        pointer = self._c.llama_get_logits(handle)
        return np.ctypeslib.as_array(pointer, shape=(count if every else 1, self.vocabulary))


class LlamaCppRuntime:
    """The runtime of GGUF files."""

    name = "llama.cpp"
    default_cache: str | None = DEFAULT

    def check(self, artifact: Path) -> list[str]:
        """Every reason why the file cannot be opened here, found without loading it."""
        reasons = []
        try:
            _expect_gguf(artifact)
        except BadInputError as error:
            reasons.append(str(error))
        try:
            refusal = binding.refusal()
        except AnyQuantError as error:
            refusal = str(error)
        return reasons + ([refusal] if refusal else [])

    def load(
        self, artifact: Path, context: int = 512, threads: int | None = None, cache: str | None = None
    ) -> LlamaCpp:
        """`LlamaCpp.open` with exact settings, but for the key-value cache when its types are given."""
        return LlamaCpp.open(artifact, context, threads, None if cache is None else Options(cache))


RUNTIME = LlamaCppRuntime()


def _expect_gguf(path: Path) -> None:
    """Raise BadInputError unless `path` is a readable file with GGUF's magic."""
    try:
        with path.open("rb") as file:
            magic = file.read(4)
    except OSError as error:
        raise BadInputError(f"cannot read {path}: {error.strerror}") from None
    if magic != b"GGUF":
        raise BadInputError(f"{path} is not a GGUF file: it starts with {magic!r} instead of b'GGUF'")


def _load_model(library: binding.Library, path: Path, options: Options) -> int:
    params = library.c.llama_model_default_params()
    params.set(binding.MODEL_GPU_LAYERS, "i", 0)
    params.set(binding.MODEL_LOAD_MODE, "i", binding.LOAD_MAP if options.map_file else binding.LOAD_READ)
    params.set(binding.MODEL_CHECK_TENSORS, "B", options.check_tensors)
    model = library.c.llama_model_load_from_file(os.fsencode(path), params)
    if not model:
        reason = library.log.reason()
        kind = UnsupportedError if any(words in reason for words in UNSUPPORTED) else BadInputError
        raise kind(f"llama.cpp refuses {path}: {reason}")
    return int(model)


def _expect_settings(library: binding.Library, context: int, wanted: tuple[int, int, int], cache: CacheTypes) -> None:
    """Raise UnsupportedError unless the context took the settings: a wrong struct layout must not pass unseen."""
    c, (size, batch, threads) = library.c, wanted
    taken = (c.llama_n_batch(context), c.llama_n_ubatch(context), c.llama_n_threads(context))
    lines = library.log.lines()
    found = {
        "size": 0 <= c.llama_n_ctx(context) - size < 256,
        "batch and threads": taken == (batch, batch, threads),
        "cache type": any(f"K ({cache.keys})" in line and f"V ({cache.values})" in line for line in lines),
    }
    wrong = [name for name, as_wanted in found.items() if not as_wanted]
    if wrong:
        raise UnsupportedError(f"llama.cpp did not take the requested {' and '.join(wrong)} of the context")
