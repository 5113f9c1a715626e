"""Perplexity: exp of the mean negative log likelihood of the text's own next tokens."""

import math
from typing import Any

import numpy as np
import numpy.typing as npt

from anyquant.core.errors import BadInputError
from anyquant.evaluation.kl import Float64


def negative_log_likelihood(log_probabilities: Float64, next_tokens: npt.NDArray[Any]) -> Float64:
    """-log p(next token) in nats, per position.

    `log_probabilities` (positions, vocabulary) at position t are for the token at t + 1, which is `next_tokens[t]`.
    Raises BadInputError when a token id lies outside the vocabulary.
    """
    vocabulary = log_probabilities.shape[-1]
    if len(next_tokens) and (next_tokens.min() < 0 or next_tokens.max() >= vocabulary):
        raise BadInputError(
            f"token id {int(next_tokens.max())} (smallest {int(next_tokens.min())}) lies outside the model's "
            f"vocabulary of {vocabulary}; the text was tokenized with another tokenizer"
        )
    chosen: Float64 = -np.take_along_axis(log_probabilities, next_tokens.astype(np.int64)[:, None], axis=-1)[:, 0]
    return chosen


def perplexity(total: float, tokens: int) -> float:
    """From the summed negative log likelihood; NaN without tokens, inf when it overflows."""
    if not tokens:
        return math.nan
    try:
        return math.exp(total / tokens)
    except OverflowError:
        return math.inf
