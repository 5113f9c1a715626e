"""How torch multiplies float32 matrices while a model is calibrated."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

from anyquant.core.extras import require

_ASKED = "bf16"  # the setting under which torch chooses oneDNN
DTYPES = ("float32", "bfloat16")  # what the blocks of a model may compute in while it is calibrated


def products_in(dtype: str) -> Any:
    """While active, torch rounds the factors and results of products to `dtype`, one of DTYPES.

    Norms and sums stay float32, and so the residual stream, unless a block adds results of products to one another.
    """
    torch = require("torch")
    return torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == "bfloat16")


@contextmanager
def fast_products() -> Iterator[None]:
    """While active, torch takes float32 products to oneDNN where that computes them in full: on AMD's processors it is
    twice as fast as what torch takes otherwise. For statistics and tuning; never where logits are compared.
    """
    products = require("torch").backends.mkldnn.matmul
    before = products.fp32_precision
    products.fp32_precision = _ASKED if _in_full() else before
    try:
        yield
    finally:
        products.fp32_precision = before


@cache
def _in_full() -> bool:
    """Whether products stay float32 when rounded factors are allowed, which is what makes torch choose oneDNN.

    Intel's processors with units for bfloat16 do round: second moments of wide inputs then are no longer definite.
    """
    torch = require("torch")
    products, factors = torch.backends.mkldnn.matmul, torch.linspace(1, 2, 64 * 64).reshape(64, 64)
    before = products.fp32_precision
    products.fp32_precision = _ASKED
    try:
        found = factors.T @ factors
    finally:
        products.fp32_precision = before
    exact = factors.double().T @ factors.double()
    return bool(((found.double() - exact).abs() <= 1e-5 * exact).all())
