"""How torch multiplies float32 matrices while a model is calibrated."""

from collections.abc import Iterator
from contextlib import contextmanager

from anyquant.core.extras import require


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
