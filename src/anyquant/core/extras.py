"""The one place that imports optional libraries, and says how to install what is missing."""

import importlib
from types import ModuleType

from anyquant.core.errors import MissingExtraError

# library -> extra of this package that installs it; what every installation has is not listed
EXTRAS = {
    "torch": "torch",
    "transformers": "torch",
    "accelerate": "torch",
    "tokenizers": "torch",
    "xllamacpp": "llamacpp",
    "compressed_tensors": "compressed-tensors",
    "bitsandbytes": "bitsandbytes",
    "torchao": "torchao",
    "datasets": "datasets",
    "mlx": "mlx",
    "mlx_lm": "mlx",
}


def require(library: str) -> ModuleType:
    """Import `library` (a dotted module name), now.

    Raises MissingExtraError with the command that installs it.
    """
    try:
        return importlib.import_module(library)
    except ModuleNotFoundError as error:
        top = library.split(".")[0]
        if error.name is not None and error.name.split(".")[0] != top:
            raise
        extra = EXTRAS.get(top)
        command = f"pip install 'anyquant[{extra}]'" if extra else f"pip install {top}"
        raise MissingExtraError(f"this needs the library {top}, which is not installed; run: {command}") from None
