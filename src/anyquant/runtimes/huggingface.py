"""A Hugging Face folder opened by `transformers` itself, quantized or not: the ecosystem's own reader of what we write.

The model class is chosen from the families we support, never from the folder (`auto_map` has no effect), and nothing is
downloaded.
"""

import contextlib
import io
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from anyquant.core.checkpoint import Checkpoint, read_tensor
from anyquant.core.errors import BadInputError, UnsupportedError
from anyquant.core.extras import require
from anyquant.models.building import FAMILIES, plain
from anyquant.runtimes.base import Logits
from anyquant.runtimes.folder import TOKENIZER, FolderSession, read_config

# of compressed-tensors: what it decodes to bfloat16 only
BFLOAT16_FORMATS = frozenset({"nvfp4-pack-quantized", "mxfp4-pack-quantized", "mxfp8-quantized"})
# quantization methods that transformers runs on a CPU, and the libraries that each needs there
METHODS: Mapping[str, tuple[str, ...]] = {
    "compressed-tensors": ("compressed_tensors",),
    "fp8": (),
    "bitsandbytes": ("bitsandbytes",),
    "torchao": ("torchao",),
}


def _refusals(folder: Path) -> list[str]:
    config = read_config(folder)
    reasons = []
    if config.get("model_type") not in FAMILIES:
        reasons.append(_unknown_family(config))
    method = _method(config)
    if method is not None and method not in METHODS:
        reasons.append(f"quantization method {method!r} is not opened here")
    if not (folder / TOKENIZER).is_file():
        reasons.append(f"there is no {TOKENIZER}")
    return reasons


def _unknown_family(config: Mapping[str, Any]) -> str:
    return f"model type {config.get('model_type')!r} is not one of {', '.join(sorted(FAMILIES))}"


def libraries_for(folder: Path) -> tuple[str, ...]:
    """What opening the folder needs beside transformers."""
    method = _method(read_config(folder))
    return METHODS.get(str(method), ())


def _method(config: Mapping[str, Any]) -> Any:
    """The quantization method that a config names; None for a model in float."""
    settings = config.get("quantization_config")
    return settings.get("quant_method", "") if isinstance(settings, dict) and settings else None


def _compute_exactly(model: Any, torch: Any) -> None:
    """bitsandbytes on a CPU with bfloat16 instructions repacks its weights for them when it first runs, and rounds what
    they are multiplied with (and a model saved then is another one); elsewhere, too, it goes by the type in the config.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
            module.compute_dtype, module.compute_type_is_set = torch.float32, True


def _computes_in_bfloat16(folder: Path) -> bool:
    """Whether the library decodes some weights of the folder to bfloat16, whatever the type of the rest."""
    settings = read_config(folder).get("quantization_config") or {}
    groups = settings.get("config_groups") or {}
    formats = {group.get("format") for group in groups.values() if isinstance(group, dict)}
    return not BFLOAT16_FORMATS.isdisjoint({settings.get("format"), *formats})


class HuggingFaceSession(FolderSession):
    """A loaded folder. Computes in float32, where the quantized scheme allows it."""

    def __init__(self, folder: Path, context: int, model: Any) -> None:
        self._torch = require("torch")
        self._model = model.eval()
        _compute_exactly(self._model, self._torch)
        with self._torch.no_grad():
            self._model(self._torch.zeros(1, 1, dtype=self._torch.long))
        ends = self._model.generation_config.eos_token_id
        super().__init__(folder, context, ends if isinstance(ends, list) else [ends])
        self._cache: Any = None

    @property
    def vocabulary(self) -> int:
        return int(self._model.config.vocab_size)

    def logits(self, tokens: Sequence[int]) -> Logits:
        """float32 (tokens, vocabulary) of a fresh sequence. Raises UsageError when it is longer than the context."""
        self._expect_room(tokens)
        with self._torch.no_grad():
            output = self._model(self._torch.tensor([list(tokens)]), use_cache=False).logits
        found: Logits = output[0].float().numpy()
        return found

    def clear(self) -> None:
        """Forget the sequence so far."""
        self._cache = None

    def _advance(self, ids: list[int]) -> Logits:
        with self._torch.no_grad():
            output = self._model(self._torch.tensor([ids]), past_key_values=self._cache, use_cache=True)
        self._cache = output.past_key_values
        last: Logits = output.logits[0, -1].float().numpy()
        return last

    def close(self) -> None:
        self._model, self._cache = None, None


class HuggingFaceRuntime:
    """Opens folders with `transformers`."""

    name = "transformers"
    default_cache: str | None = None

    def check(self, artifact: Path) -> list[str]:
        """Every reason why the folder cannot be opened, from its config alone."""
        return _refusals(artifact)

    def load(
        self, artifact: Path, context: int = 512, threads: int | None = None, cache: str | None = None
    ) -> HuggingFaceSession:
        """Open the folder. Raises UnsupportedError with all reasons of `check`, and for a `cache`."""
        if cache is not None:
            raise UnsupportedError(
                f"{artifact}: transformers is run without a key-value cache type ({cache}); only llama.cpp can be told"
            )
        reasons = _refusals(artifact)
        if reasons:
            raise UnsupportedError(f"{artifact}: transformers cannot run it: {'; '.join(reasons)}")
        with _quiet(threads), _told(artifact):
            for library in libraries_for(artifact):
                require(library)
            dtype = "bfloat16" if _computes_in_bfloat16(artifact) else "float32"
            model = _model_class(artifact).from_pretrained(
                artifact, local_files_only=True, use_safetensors=True, dtype=dtype
            )
            if "torchao" in libraries_for(artifact):  # its weights keep the type they are stored for
                model = model.to(require("torch").float32)
            return HuggingFaceSession(artifact, context, model)


def opens(folder: Path) -> bool:
    """Whether `transformers` itself reads the way in which the folder is quantized, on a CPU."""
    method = _method(read_config(folder))
    return method is None or method in METHODS


def load_decoded(model: Checkpoint, folder: Path, context: int, threads: int | None = None) -> HuggingFaceSession:
    """The `folder` of a `model` whose weights are decoded here: all of them in float32, in memory.

    Raises UnsupportedError for a model type that is not run here, BadInputError when transformers refuses it.
    """
    if model.config.get("model_type") not in FAMILIES:
        raise UnsupportedError(f"{folder}: transformers cannot run it: {_unknown_family(model.config)}")
    torch, transformers = require("torch"), require("transformers")
    fields = plain(model.config)
    with _quiet(threads), _told(folder):
        state = {name: torch.from_numpy(read_tensor(model, name)) for name in model.names()}
        settings = transformers.CONFIG_MAPPING[str(model.config["model_type"])](**fields)
        found = _model_class(folder).from_pretrained(None, config=settings, state_dict=state, dtype="float32")
        return HuggingFaceSession(folder, context, found)


def _model_class(folder: Path) -> Any:
    return getattr(require("transformers"), FAMILIES[str(read_config(folder)["model_type"])][1])


@contextlib.contextmanager
def _quiet(threads: int | None) -> Iterator[None]:
    """What the libraries print on import and while they load is not for the user; nor are progress bars, of which
    compressed-tensors draws some that cannot be switched off, the last when the first token comes."""
    if threads is not None:
        require("torch").set_num_threads(threads)
    transformers = require("transformers")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    with contextlib.redirect_stderr(io.StringIO()):
        yield


@contextlib.contextmanager
def _told(folder: Path) -> Iterator[None]:
    """What transformers trips over, as a fault of the folder."""
    try:
        yield
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise BadInputError(f"{folder}: transformers cannot load it: {error}") from None


RUNTIME = HuggingFaceRuntime()
