"""Documents of one length on their way through the blocks of a streamed model."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from anyquant.core.errors import UsageError


def same_arguments(one: Any, other: Any, torch: Any) -> bool:
    """Whether two nests of arguments hold the same values."""
    if one is other:
        return True
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        return one.shape == other.shape and bool(torch.equal(one, other))
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        return one.keys() == other.keys() and all(same_arguments(one[key], other[key], torch) for key in one)
    if isinstance(one, tuple | list) and isinstance(other, tuple | list):
        return len(one) == len(other) and all(same_arguments(*pair, torch) for pair in zip(one, other, strict=True))
    return type(one) in (int, float, bool, str) and bool(one == other)


@dataclass
class Batch:
    """Documents of one length on their way through the blocks.

    `documents` are indices into the caller's sequence, `states` a float32 tensor (documents, length, hidden).
    `calls` holds per block the further positional and keyword arguments of its call.
    """

    documents: tuple[int, ...]
    states: Any
    calls: Sequence[tuple[tuple[Any, ...], Mapping[str, Any]]]

    @property
    def tokens(self) -> int:
        return int(self.states.shape[0] * self.states.shape[1])


def group_documents(documents: Sequence[Sequence[int]], batch_tokens: int) -> list[tuple[int, ...]]:
    """Indices of documents of equal length, at most `batch_tokens` tokens each but at least one document.

    Equal lengths need no padding, so a document's result does not depend on its neighbours' lengths.
    Raises UsageError for an empty document.
    """
    by_length: dict[int, list[int]] = {}
    for index, document in enumerate(documents):
        if not len(document):
            raise UsageError(f"document {index} has no tokens")
        by_length.setdefault(len(document), []).append(index)
    groups = []
    for length, indices in sorted(by_length.items()):
        size = max(1, batch_tokens // length)
        groups += [tuple(indices[start : start + size]) for start in range(0, len(indices), size)]
    return groups
