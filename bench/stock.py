"""The bar for a contract: llama.cpp's named mixtures, encoded by llama.cpp, on the text that `anyquant make` would use.

    python bench/stock.py MODEL --text TEXT [--presets Q5_K_M,Q4_K_M,Q3_K_M,Q2_K] [--out FOLDER] [--llama FOLDER]

Every quantized row is what `ggml_quantize_chunk` makes of it with the importance that `anyquant make MODEL --text TEXT`
collects; the tensor types are those of llama.cpp's own quantizer. The GGUF is run in llama.cpp on the *select* and
*certify* documents of that same command and compared with the original in `transformers`. One JSON line per preset;
`--out` keeps the files. `bytes` are those of our file, whose header has room for a certificate (800 bytes) that a stock
file has not.

`--llama` is a folder with a llama.cpp whose libllama exports `llama_model_quantize` (see tools/record_presets.py). Each
file is then made by that, too, with and without importance, and the tensors of other type or other bytes are listed.
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "tools")]

from record_presets import Quantizer

from anyquant import api
from anyquant.calibrate.stats import Statistics
from anyquant.core.progress import Silent
from anyquant.core.qtensor import QTensor
from anyquant.formats import FORMATS, rules
from anyquant.formats.gguf.layouts import layout
from anyquant.grids import grid as find_grid
from anyquant.models.detect import detect
from anyquant.pipeline.blocks import Block, read_block
from anyquant.pipeline.measure import ReferenceLogits, answers, compare
from anyquant.pipeline.planner import Job, Model, make_job
from anyquant.pipeline.recipe import Calibration, Recipe
from anyquant.pipeline.rows import Direct, Importance, Unweighted
from anyquant.pipeline.run import execute
from anyquant.pipeline.statistics import gather
from anyquant.pipeline.texts import load_splits, source_tokenizer
from anyquant.runtimes import RUNTIMES
from anyquant.runtimes.transformers import TransformersRuntime
from anyquant.store.gguf import GGUFFile
from anyquant.store.publish import Stage
from support.ggml import stock_encode


class StockRows:
    """The rows of a job as ggml encodes them; those that stay in float as we write them."""

    def __init__(self, job: Job, statistics: Importance) -> None:
        self._job, self._statistics, self._float = job, statistics, Direct(job, statistics)

    def rows(self, block: Block) -> QTensor:
        grid = find_grid(self._job.plan.decisions[block.linear.name].grid)
        if grid.family == "floating":
            return self._float.rows(block)
        weights, kind = read_block(self._job, block), layout(grid.name)
        encoded = stock_encode(kind.ggml_type, weights, self._statistics.importance(block.linear))
        params, codes = kind.unpack(encoded)
        return QTensor(grid, weights.shape, codes, params)


@dataclass(frozen=True)
class Bench:
    """What all presets share."""

    model: Model
    statistics: Statistics
    references: Mapping[str, ReferenceLogits]
    llama: Path | None

    def write(self, recipe: Recipe, statistics: Importance, folder: Path) -> Path:
        """The stock file of a recipe, in `folder`."""
        job = make_job(self.model, rules("gguf"), recipe, not isinstance(statistics, Unweighted))
        with Stage(folder, overwrite=True) as stage:
            execute(job, StockRows(job, statistics), stage, 1, Silent())
            stage.publish()
        return folder / job.format.entry

    def line(self, preset: str, folder: Path) -> dict[str, Any]:
        """One line of the table."""
        began = time.monotonic()
        file = self.write(Recipe(preset=preset), self.statistics, folder)
        found: dict[str, Any] = {"preset": preset, "bytes": file.stat().st_size}
        found["tensor_bytes"] = sum(int(tensor.n_bytes) for tensor in gguf.GGUFReader(file).tensors)
        found["encode_seconds"] = round(time.monotonic() - began, 1)
        for name, reference in self.references.items():
            longest = max(len(document.tokens) for document in reference.documents)
            runtime = RUNTIMES.get("llama.cpp")
            with runtime.load(file, longest, 1, runtime.default_cache) as session:
                measures = compare(answers(session, reference.documents), reference, Silent(), "")
            found[name] = round(measures.mean_kl.value, 7)
            found[f"{name}_interval"] = [round(end, 7) for end in measures.mean_kl.interval]
            found[f"{name}_documents"] = measures.documents
        found["seconds"] = round(time.monotonic() - began, 1)
        if self.llama is not None:
            found["unlike_llama"] = self.unlike(self.llama, preset, file)
        return found

    def unlike(self, llama: Path, preset: str, file: Path) -> dict[str, list[str]]:
        """Tensors in which the file of a preset, and one without importance, differ from `llama_model_quantize`'s."""
        names, architecture = FORMATS.get("gguf").part_names(self.model.architecture), self.model.architecture
        importance = {}
        for linear in architecture.linears:
            values = self.statistics.importance(linear)
            if values is not None:
                importance[names[linear.name]] = np.ascontiguousarray(values, dtype=np.float32)
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary)
            source = self.write(Recipe(grid="f32", embedding="f32", head="f32"), Unweighted(), folder / "float")
            plain = self.write(Recipe(preset=preset), Unweighted(), folder / "plain")
            file_type = int(GGUFFile(file).metadata["general.file_type"])
            found = {}
            for key, ours, given in (("with importance", file, importance), ("without", plain, None)):
                made = folder / "llama.gguf"
                # a process of its own: the symbols of two llama.cpp do not live together
                with ProcessPoolExecutor(1, get_context("spawn")) as child:
                    child.submit(quantize, llama, source, made, file_type, given).result()
                found[key] = differing(ours, made)
        return found


def quantize(
    llama: Path, source: Path, target: Path, file_type: int, importance: dict[str, npt.NDArray[np.float32]] | None
) -> None:
    """`llama_model_quantize` of a float GGUF."""
    quantizer = Quantizer(llama)
    if not quantizer.run(source, target, file_type, importance):
        raise RuntimeError(f"llama.cpp refuses file type {file_type}: {'; '.join(quantizer.messages)}")


def differing(ours: Path, theirs: Path) -> list[str]:
    """Names of the tensors that are not in both files with the same type, shape and bytes."""
    files = [{one.name: one for one in gguf.GGUFReader(path).tensors} for path in (ours, theirs)]
    return sorted(
        name
        for name in files[0].keys() | files[1].keys()
        if name not in files[0]
        or name not in files[1]
        or files[0][name].tensor_type != files[1][name].tensor_type
        or not np.array_equal(files[0][name].data, files[1][name].data)
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--text")
    parser.add_argument("--tokens", type=int, default=Calibration.tokens)
    parser.add_argument("--presets", default="Q5_K_M,Q4_K_M,Q3_K_M,Q2_K")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--llama", type=Path)
    given = parser.parse_args()
    checkpoint = api.source_of(api.model_path(given.model))
    architecture = detect(checkpoint)
    calibration = Calibration(text=given.text, tokens=given.tokens)
    splits = load_splits(source_tokenizer(checkpoint), architecture, calibration)
    statistics = gather(checkpoint, architecture, calibration, splits.calibrate, Silent())
    runtime = TransformersRuntime(checkpoint, architecture)
    with tempfile.TemporaryDirectory() as temporary:
        parts = {"select": splits.select, "certify": splits.certify}
        references = {name: ReferenceLogits(runtime, part, Path(temporary), Silent()) for name, part in parts.items()}
        bench = Bench(Model(architecture, checkpoint, checkpoint), statistics, references, given.llama)
        for preset in given.presets.split(","):
            print(json.dumps(bench.line(preset, (given.out or Path(temporary)) / preset)), flush=True)


if __name__ == "__main__":
    main()
