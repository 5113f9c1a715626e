"""How much the model's answer depends on the output of each Linear: second moments of gradients of its log-likelihood.

With y drawn from the model's own distribution, the second moment of the gradient of log p(y) at the output of a Linear
is the output side of the Kronecker-factored Fisher information of its weights, O (x) H: to second order, tr(O D H D^T)
is what an error D of the weights costs in KL divergence (Martens & Grosse 2015, arXiv 1503.05671; for rounding: YAQA,
arXiv 2505.22988).
"""

import json
from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np

from anyquant.calibrate.roundtrip import SEED, Draw, RoundTrip, Sampler
from anyquant.core.dtypes import Float32
from anyquant.core.errors import AnyQuantError, BadInputError
from anyquant.core.extras import require
from anyquant.core.linear import Linear, Role
from anyquant.core.progress import Progress, Silent
from anyquant.models.streaming import StreamedModel
from anyquant.store.journal import Journal
from anyquant.store.system import writing

INDEX = "outputs.json"  # written last: what it names is whole
MOST_OUTPUTS = 4096
WHOLE = 128  # outputs that are not parted, so that grids with blocks of rows are not either


class OutputStatistics:
    """The output sides that lie in `folder`; each is read when it is asked for.

    Raises BadInputError when the folder is not whole.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        found = Journal(folder).read(INDEX) if folder.is_dir() else None
        try:
            self._index: dict[str, dict[str, Any]] = json.loads(found or b"")
        except ValueError:
            raise BadInputError(f"{folder}: the gradients at the outputs are not all there; start again") from None

    @staticmethod
    def complete(folder: Path) -> bool:
        """Whether `collect_output_statistics` came to its end there."""
        return (folder / INDEX).is_file()

    def of(self, linear: Linear) -> Float32 | None:
        """Mean of g g^T over all tokens, g (out,) the gradient at the Linear's output: (out, out) float32.

        Of a Linear with more outputs than the bound only the diagonal blocks, (blocks, size, size): block i is about
        the outputs from i * size on; the last may be cut off, its remaining rows and columns are 0. None for experts
        and routers. Raises BadInputError when the file is damaged.
        """
        entry = self._index.get(linear.name)
        if entry is None:
            return None
        data = Journal(self.folder).read(_file(linear.name))
        if data is None or sha256(data).hexdigest() != entry["sha256"]:
            raise BadInputError(f"{self.folder / _file(linear.name)}: is missing or damaged; start again")
        values: Float32 = np.frombuffer(data, dtype="<f4").reshape(entry["shape"]).copy()
        return values

    def digest(self, linear: Linear) -> str:
        """sha256 of the values, "" where there are none."""
        return str(self._index.get(linear.name, {}).get("sha256", ""))


def collect_output_statistics(
    model: StreamedModel,
    documents: Sequence[Sequence[int]],
    folder: Path,
    progress: Progress | None = None,
    most_outputs: int = MOST_OUTPUTS,
    draw: Draw | None = None,
) -> OutputStatistics:
    """Run `documents` (token ids) through the float model and back; one token is drawn at each position by `draw`, by
    default with a fixed seed. The results lie in `folder`, which is made; the states of all blocks lie in nameless
    files there while this runs: 4 x tokens x hidden x (blocks + 2) bytes.

    Memory: a block and what one batch leaves in it for the way back, its statistics, a bounded piece of logits.
    Raises UsageError without tokens, UnsupportedError for a model without a head, BadInputError for gradients that are
    not finite, OutputError when the folder cannot be written.
    """
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    way = RoundTrip(model, documents, folder, progress or Silent())
    way.forward()
    way.turn(draw or Sampler(SEED))
    journal, index = Journal(folder), {}
    for block in reversed(range(model.blocks)):
        linears = [one for one in model.architecture.linears if one.block == block and _watched(one)]
        sums = {linear.name: _Sum(linear, most_outputs) for linear in linears}
        way.back(block, linears, lambda passed, sums=sums: sums[passed.linear.name].add(passed.gradients))  # type: ignore[misc]
        for name, total in sums.items():
            values = total.result(way.tokens, f"{model.checkpoint.location}: block {block}, {name}")
            digest = journal.write(_file(name), [np.ascontiguousarray(values, dtype="<f4").data])
            index[name] = {"shape": values.shape, "sha256": digest}
    journal.write(INDEX, [json.dumps(index, sort_keys=True).encode()])
    way.progress.finish()
    return OutputStatistics(folder)


class _Sum:
    """Running sum of g g^T, or of its diagonal blocks of equal size."""

    def __init__(self, linear: Linear, most_outputs: int) -> None:
        outputs = linear.shape[0]
        self._size = outputs
        if outputs > most_outputs:
            even = -(-outputs // -(-outputs // most_outputs))
            self._size = min(most_outputs, -(-even // WHOLE) * WHOLE)
        self._blocks = -(-outputs // self._size)
        self._total = require("torch").zeros((self._blocks, self._size, self._size))
        self.seen = 0

    def add(self, gradients: Any) -> None:
        """Account for `gradients` (tokens, out)."""
        self.seen += len(gradients)
        gradients = gradients.float()
        for block in range(self._blocks):
            part = gradients[:, block * self._size : (block + 1) * self._size]
            at = slice(0, part.shape[1])
            self._total[block, at, at] += part.T @ part

    def result(self, tokens: int, where: str) -> Float32:
        """The mean. Raises AnyQuantError unless all tokens came by, BadInputError when it is not finite."""
        if self.seen != tokens:
            raise AnyQuantError(f"{where}: {self.seen} of {tokens} gradients came back through its output")
        total = self._total.div_(tokens)
        if not require("torch").isfinite(total.sum()):
            raise BadInputError(f"{where}: the gradient at its output is not finite")
        mean: Float32 = ((total + total.mT) / 2).numpy()
        return mean[0] if self._blocks == 1 else mean


def _watched(linear: Linear) -> bool:
    return linear.expert is None and linear.role is not Role.ROUTER


def _file(name: str) -> str:
    return f"output-{name}.f32"
