"""Ledger: every byte of every tensor, requested, applied, and why. Nothing is skipped in silence."""

from dataclasses import dataclass

from anyquant.core.errors import AnyQuantError


@dataclass(frozen=True)
class Line:
    """One Linear or carried tensor. Bytes are exact; `error` is the relative weighted squared error of the rounding.

    error = sum w (x - q)^2 / sum w x^2 with the grid's own weighting w; 0 for values stored exactly.
    """

    name: str
    role: str
    source: str
    source_dtype: str
    source_bytes: int
    requested: str
    applied: str
    algorithm: str
    target: str
    target_bytes: int
    reason: str
    error: float | None = None


@dataclass(frozen=True)
class Ledger:
    """`unused` are source tensors that have no place in the target, with the reason for each."""

    lines: tuple[Line, ...]
    unused: tuple[tuple[str, int, str], ...]

    def balance(self, source_bytes: int, target_bytes: int) -> None:
        """Raise AnyQuantError when the lines do not account for every byte on both sides."""
        source = sum(line.source_bytes for line in self.lines) + sum(size for _, size, _ in self.unused)
        target = sum(line.target_bytes for line in self.lines)
        if source != source_bytes:
            raise AnyQuantError(f"ledger: {source} source bytes accounted for, the checkpoint has {source_bytes}")
        if target != target_bytes:
            raise AnyQuantError(f"ledger: {target} target bytes accounted for, the artifact has {target_bytes}")
