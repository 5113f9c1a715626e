"""What storing a part of the model in fewer bits costs, in nats of KL divergence per token: estimates from a sample.

Two ways: from inner products of the weights' errors with gradients of the log-likelihood of whole documents, or from
the divergence measured with one candidate, carried over to the others by their weighted squared errors.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from anyquant.core.errors import AnyQuantError
from anyquant.evaluation.bootstrap import ratio
from anyquant.evaluation.kl import Float64


@dataclass(frozen=True)
class Estimate:
    """`loss` in nats per token, and its standard error from the spread between documents.

    Of a single document the error is the loss itself: nothing is known of the spread.
    """

    loss: float
    error: float


def from_products(products: Float64, lengths: Sequence[int]) -> Estimate:
    """1/2 E <g, d>^2 per token, from the products of an error d with the gradients g of each document.

    `products` (draws, documents); those of several matrices that change together are added before. `lengths` are the
    tokens of the documents. The draws of one document are not independent of each other as documents are: the
    standard error is that of a ratio of sums over documents (Cochran, "Sampling Techniques", section 6.4).
    """
    sizes = np.asarray(lengths, dtype=np.float64)
    if products.ndim != 2 or products.shape[1] != len(sizes) or not products.size:
        raise AnyQuantError(f"products of shape {products.shape} for {len(sizes)} documents")
    return from_documents(np.square(products).mean(axis=0) / 2, lengths)


def from_documents(divergences: Float64, lengths: Sequence[int]) -> Estimate:
    """The divergence per token, from its sums over the tokens of each document."""
    loss, error = ratio(divergences, np.asarray(lengths, dtype=np.float64))
    return Estimate(loss, error if len(lengths) > 1 else abs(loss))


def carried_over(measured: Estimate, errors: Mapping[str, float], together: float) -> dict[str, Estimate]:
    """Candidate -> its estimate, in proportion to its weighted squared error.

    `errors` by candidate; `measured` is the divergence when errors that sum to `together` were made at once, by this
    part of the model alone or with others: to second order, the divergence grows with the square of the error.
    """
    if not together > 0:
        return {name: Estimate(0.0, 0.0) for name in errors}
    return {
        name: Estimate(measured.loss * error / together, measured.error * error / together)
        for name, error in errors.items()
    }


def affordable(shares: Sequence[float], documents: int, forwards: float) -> int:
    """How many of the documents may go through the parts of the model `shares`, so that all does not cost more than
    `forwards` passes of all documents through the whole model: at least one."""
    return max(1, min(documents, int(forwards * documents / sum(shares)))) if shares else documents
