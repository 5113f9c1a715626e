"""Kullback-Leibler divergence of the next-token distributions, per position, in nats.

KL(P || Q) = sum over the vocabulary of p (log p - log q), P the reference, Q the candidate.
"""

from typing import Any

import numpy as np
import numpy.typing as npt

from anyquant.core.errors import BadInputError

Float64 = npt.NDArray[np.float64]

TAIL = 0.999
TAIL_TOKENS = 50_000  # fewer leave under 50 tokens above the 99.9 % quantile: shown, but never certified


def log_softmax(logits: npt.NDArray[Any]) -> Float64:
    """Natural logarithm of the softmax over the last axis, float64, stable for logits of any size.

    A row with NaN or +inf, or with nothing but -inf, comes out as NaN.
    """
    values = np.asarray(logits).astype(np.float64)
    with np.errstate(invalid="ignore", divide="ignore"):
        values -= values.max(axis=-1, keepdims=True)
        values -= np.log(np.exp(values).sum(axis=-1, keepdims=True))
    return values


def divergence(reference: Float64, candidate: Float64) -> Float64:
    """KL per position from two arrays of log probabilities (positions, vocabulary).

    inf where the candidate rules out what the reference allows, NaN where a row is not a distribution.
    """
    with np.errstate(invalid="ignore"):
        probability = np.exp(reference)
        terms = np.where(probability == 0, 0.0, probability * (reference - candidate))
        total = terms.sum(axis=-1)
        return np.where(total < 0, 0.0, total)  # exact zero may round to -1e-17


def same_vocabulary(reference: npt.NDArray[Any], candidate: npt.NDArray[Any]) -> None:
    """Raise BadInputError unless both are logits (positions, vocabulary) of the same shape."""
    if reference.ndim != 2 or candidate.ndim != 2 or len(reference) != len(candidate):
        raise BadInputError(
            f"logits to compare have shapes {reference.shape} and {candidate.shape}; expected (positions, vocabulary)"
        )
    if reference.shape[1] != candidate.shape[1]:
        raise BadInputError(
            f"the candidate's vocabulary has {candidate.shape[1]} entries, the reference's {reference.shape[1]}; "
            "these are different models, or one is padded: cut the padding off before comparing"
        )


def kl_divergence(reference: npt.NDArray[Any], candidate: npt.NDArray[Any]) -> Float64:
    """KL per position from logits (positions, vocabulary). Raises BadInputError when the shapes differ."""
    same_vocabulary(reference, candidate)
    return divergence(log_softmax(reference), log_softmax(candidate))


def tail_quantile(values: Float64) -> float:
    """The 99.9 % quantile over tokens, linear between neighbours; NaN when a value is not finite or there is none."""
    if not len(values) or not np.isfinite(values).all():
        return float("nan")
    return float(np.quantile(values, TAIL))
