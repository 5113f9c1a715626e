"""Layer 4: what runs an artifact. One runtime, one file."""

from anyquant.core.registry import Registry
from anyquant.runtimes.base import Runtime

RUNTIMES: Registry[Runtime] = Registry(
    "runtime",
    {
        "llama.cpp": "anyquant.runtimes.llamacpp:RUNTIME",
        "transformers": "anyquant.runtimes.huggingface:RUNTIME",
        "mlx": "anyquant.runtimes.mlx:RUNTIME",
    },
    "anyquant.runtimes",
)
