"""AnyQuant: quantize once, run anywhere, and prove it.

import anyquant as aq
report = aq.make("PATH", target="llama.cpp", quality="balanced", out="OUT")
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from anyquant.api import (
        Calibration,
        Comparison,
        Contract,
        DropLimit,
        Recipe,
        Report,
        Sensitivity,
        convert,
        evaluate,
        inspect,
        make,
        plan,
        reproduce,
        run,
        sensitivity,
    )

__version__ = "0.1.0"
__all__ = [
    "Calibration",
    "Comparison",
    "Contract",
    "DropLimit",
    "Recipe",
    "Report",
    "Sensitivity",
    "convert",
    "evaluate",
    "inspect",
    "make",
    "plan",
    "reproduce",
    "run",
    "sensitivity",
]


def __getattr__(name: str) -> Any:
    """The verbs load when first used, so that `import anyquant` is instant."""
    if name in __all__:
        from anyquant import api

        return getattr(api, name)
    raise AttributeError(f"module 'anyquant' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
