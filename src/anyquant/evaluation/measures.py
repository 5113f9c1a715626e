"""How far a candidate's next-token distributions are from the reference's: all measures in one pass over the logits.

Logits at position t predict the token at t + 1. Divergence and agreement use every position, perplexity those whose
next token is known. Everything is paired per document.
"""

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from anyquant.core.errors import BadInputError
from anyquant.evaluation.agreement import same_top
from anyquant.evaluation.bootstrap import ENOUGH_DOCUMENTS, Estimate, estimate
from anyquant.evaluation.kl import TAIL_TOKENS, Float64, divergence, log_softmax, same_vocabulary, tail_quantile
from anyquant.evaluation.perplexity import negative_log_likelihood, perplexity

CONFIDENCE = 0.95  # of one-sided bounds
_ELEMENTS = 1 << 20  # logits widened to float64 at once


@dataclass(frozen=True)
class DocumentValues:
    """Sums over one document: KL in nats and agreeing tops over `tokens`, negative log likelihoods over `targets`.

    `nonfinite` counts the positions where a value is NaN or infinite.
    """

    name: str
    tokens: int
    targets: int
    kl: float
    same_top: float
    nll_reference: float
    nll_candidate: float
    nonfinite: int


@dataclass(frozen=True)
class Measures:
    """`mean_kl` in nats per token; `same_top` a share of 0 to 1; `ppl_ratio` candidate / reference, paired.

    `kl_99_9` is the 99.9 % quantile over tokens, with its standard error, and `kl_99_9_upper` its one-sided 95 % bound,
    NaN below 50k tokens, where nothing is certified. `nonfinite` positions make every value that they touch NaN or inf;
    none is left out.
    `conclusive`: at least 30 documents, all values finite.
    """

    documents: int
    tokens: int
    mean_kl: Estimate
    kl_99_9: float
    kl_99_9_error: float
    kl_99_9_upper: float
    kl_99_9_certified: bool
    kl_max: float
    same_top: Estimate
    ppl_reference: float
    ppl_candidate: float
    ppl_ratio: Estimate
    nonfinite: int
    nonfinite_document: str | None
    conclusive: bool
    per_document: tuple[DocumentValues, ...]


@dataclass
class _Sums:
    divergences: list[Float64] = field(default_factory=list)
    targets: int = 0
    same_top: int = 0
    nll_reference: float = 0.0
    nll_candidate: float = 0.0
    nonfinite: int = 0


class Comparison:
    """Collects logits chunk by chunk; keeps eight bytes per token, never the logits."""

    def __init__(self) -> None:
        self._sums: dict[str, _Sums] = {}

    def add(
        self,
        document: str,
        reference: npt.NDArray[Any],
        candidate: npt.NDArray[Any],
        token_ids: npt.NDArray[Any] | list[int] | tuple[int, ...],
    ) -> None:
        """The next positions of `document`: logits (positions, vocabulary) of any float type, in order.

        `token_ids` are the ids at these positions, and, where it is known, the one after them. Chunks of one document
        need that last id, or the position before each border is missing from the perplexity.
        Raises BadInputError for shapes that do not fit or ids outside the vocabulary.
        """
        same_vocabulary(reference, candidate)
        ids = np.asarray(token_ids, dtype=np.int64)
        if len(ids) not in (len(reference), len(reference) + 1):
            raise BadInputError(
                f"{document}: {len(ids)} token ids for {len(reference)} positions of logits; "
                "expected as many, or one more"
            )
        sums = self._sums.setdefault(document, _Sums())
        following = ids[1:]
        rows = max(1, _ELEMENTS // max(1, reference.shape[1]))
        for start in range(0, len(reference), rows):
            part = slice(start, start + rows)
            _accumulate(sums, reference[part], candidate[part], following[part])

    def measures(self, seed: int = 0) -> Measures:
        """Everything so far. `seed` fixes the bootstrap. Raises BadInputError when nothing was added."""
        if not self._sums:
            raise BadInputError("nothing to measure: no document was compared; give a longer text")
        rows = tuple(_values(name, sums) for name, sums in self._sums.items())
        tokens = np.array([row.tokens for row in rows], dtype=np.float64)
        targets = np.array([row.targets for row in rows], dtype=np.float64)
        mean_kl = _clipped(estimate(np.array([row.kl for row in rows]), tokens, seed=seed), 0.0, math.inf)
        agreement = _clipped(estimate(np.array([row.same_top for row in rows]), tokens, seed=seed), 0.0, 1.0)
        differences = np.array([row.nll_candidate - row.nll_reference for row in rows])
        per_document = [np.concatenate(sums.divergences) for sums in self._sums.values()]
        everything = np.concatenate(per_document)
        certified = len(everything) >= TAIL_TOKENS and len(rows) >= ENOUGH_DOCUMENTS
        nonfinite = sum(row.nonfinite for row in rows)
        tails = None if nonfinite or len(rows) < 2 else resampled_tails(per_document, seed)
        return Measures(
            documents=len(rows),
            tokens=len(everything),
            mean_kl=mean_kl,
            kl_99_9=tail_quantile(everything),
            kl_99_9_error=math.nan if tails is None else float(tails.std(ddof=1)),
            kl_99_9_upper=float(np.quantile(tails, CONFIDENCE)) if certified and tails is not None else math.nan,
            kl_99_9_certified=certified and not nonfinite,
            kl_max=float(everything.max()),
            same_top=agreement,
            ppl_reference=perplexity(sum(row.nll_reference for row in rows), int(targets.sum())),
            ppl_candidate=perplexity(sum(row.nll_candidate for row in rows), int(targets.sum())),
            ppl_ratio=_exponential(estimate(differences, targets, seed=seed)),
            nonfinite=nonfinite,
            nonfinite_document=next((row.name for row in rows if row.nonfinite), None),
            conclusive=len(rows) >= ENOUGH_DOCUMENTS and not nonfinite,
            per_document=rows,
        )


def resampled_tails(divergences: list[Float64], seed: int = 0, replicates: int = 1000) -> Float64:
    """The 99.9 % quantile in samples of documents with replacement: its spread, and the percentile bound, follow."""
    values = np.concatenate(divergences)
    sizes = np.array([len(part) for part in divergences])
    owners = np.repeat(np.arange(len(divergences)), sizes)
    order = np.argsort(values)[::-1]
    values, owners = values[order], owners[order]
    generator = np.random.default_rng(seed)
    quantiles = np.empty(replicates)
    for replicate in range(replicates):
        drawn = np.bincount(generator.integers(len(sizes), size=len(sizes)), minlength=len(sizes))
        above = np.cumsum(drawn[owners])
        quantiles[replicate] = values[np.searchsorted(above, 0.001 * above[-1])]
    return quantiles


def _accumulate(
    sums: _Sums, reference: npt.NDArray[Any], candidate: npt.NDArray[Any], following: npt.NDArray[np.int64]
) -> None:
    log_reference, log_candidate = log_softmax(reference), log_softmax(candidate)
    kl = divergence(log_reference, log_candidate)
    known = len(following)
    nll_reference = negative_log_likelihood(log_reference[:known], following)
    nll_candidate = negative_log_likelihood(log_candidate[:known], following)
    broken = ~np.isfinite(kl)
    broken[:known] |= ~np.isfinite(nll_reference) | ~np.isfinite(nll_candidate)
    sums.divergences.append(kl)
    sums.targets += known
    sums.same_top += int(same_top(reference, candidate).sum())
    sums.nll_reference += float(nll_reference.sum())
    sums.nll_candidate += float(nll_candidate.sum())
    sums.nonfinite += int(broken.sum())


def _values(name: str, sums: _Sums) -> DocumentValues:
    """A document with a broken position has no share of agreement either: NaN never equals its own top."""
    tokens = sum(len(part) for part in sums.divergences)
    kl = float(sum(part.sum() for part in sums.divergences))
    agreed = float(sums.same_top) if not sums.nonfinite else math.nan
    return DocumentValues(
        name, tokens, sums.targets, kl, agreed, sums.nll_reference, sums.nll_candidate, sums.nonfinite
    )


def _clipped(found: Estimate, smallest: float, largest: float) -> Estimate:
    """Bounds inside the range that the quantity can take; NaN stays NaN."""

    def clip(value: float) -> float:
        return float(np.clip(value, smallest, largest))

    low, high = found.interval
    return Estimate(
        found.value,
        found.standard_error,
        clip(found.lower),
        clip(found.upper),
        (clip(low), clip(high)),
        found.documents,
        found.conclusive,
    )


def _exponential(found: Estimate) -> Estimate:
    """From the mean difference of log likelihoods to the ratio of perplexities; standard error to first order."""

    def exp(value: float) -> float:
        with np.errstate(over="ignore"):
            return float(np.exp(value))

    low, high = found.interval
    value = exp(found.value)
    return Estimate(
        value,
        found.standard_error * value,
        exp(found.lower),
        exp(found.upper),
        (exp(low), exp(high)),
        found.documents,
        found.conclusive,
    )
