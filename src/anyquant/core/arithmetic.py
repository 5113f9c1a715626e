"""How torch multiplies float32 matrices while a model is calibrated."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from anyquant.core.extras import require

DTYPES = ("float32", "bfloat16")  # what the blocks of a model may compute in while it is calibrated


def products_in(dtype: str) -> Any:
    """While active, torch rounds the factors and results of products to `dtype`, one of DTYPES.

    Norms and sums stay float32, and so the residual stream, unless a block adds results of products to one another.
    """
    torch = require("torch")
    return torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == "bfloat16")


@contextmanager
def fast_products() -> Iterator[None]:
    """While active, torch may round the factors of float32 products to bfloat16 where the processor has units for it.

    Sums stay float32, and so does all else; x^T x stays positive semidefinite, as both factors are rounded alike.
    Processors without such units (and torch chooses another library then) compute in full float32, on AMD's at twice
    the speed. For statistics and tuning; never where logits are compared.
    """
    products = require("torch").backends.mkldnn.matmul
    before = products.fp32_precision
    products.fp32_precision = "bf16"
    try:
        yield
    finally:
        products.fp32_precision = before
