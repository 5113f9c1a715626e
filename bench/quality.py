"""Mean KL of our k-quants against ggml's own encoder: the same mixture, bytes, importance and tokens.

    python bench/quality.py [MODEL] [--text FILE] [--presets Q4_K_M,Q3_K_M,Q2_K]

Both files are written from the same plan; in the second every quantized row is encoded by `ggml_quantize_chunk`. Both
are run in llama.cpp on the *certify* text and compared with the original in `transformers`.
"""

import argparse
import sys
import tempfile
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

from anyquant import api
from anyquant.core.progress import Silent
from anyquant.core.qtensor import QTensor
from anyquant.evaluation.measures import Measures
from anyquant.formats import rules
from anyquant.formats.gguf.layouts import layout
from anyquant.grids import grid as find_grid
from anyquant.models.detect import detect
from anyquant.pipeline.blocks import blocks, read_block
from anyquant.pipeline.measure import ReferenceLogits, answers, compare
from anyquant.pipeline.planner import Job, Model, make_job, writable
from anyquant.pipeline.recipe import Calibration, Recipe
from anyquant.pipeline.rows import Direct, Importance, Unweighted
from anyquant.pipeline.run import execute
from anyquant.pipeline.statistics import gather
from anyquant.pipeline.targets import target
from anyquant.pipeline.texts import load_splits, source_tokenizer
from anyquant.runtimes import RUNTIMES
from anyquant.runtimes.transformers import TransformersRuntime
from anyquant.store.open import open_checkpoint
from anyquant.store.publish import Stage
from support.ggml import stock_encode


def overwrite_with_stock(job: Job, statistics: Importance, file: Path) -> None:
    """Replace every quantized row of a finished file by what ggml makes of the same weights and importance."""
    places = {name: part.offset for name, (_, part) in job.layout.locate().items()}
    with file.open("r+b") as output:
        for block in blocks(job):
            grid = find_grid(job.plan.decisions[block.linear.name].grid)
            if grid.family == "floating":
                continue
            weights = read_block(job, block)
            kind = layout(grid.name)
            params, codes = kind.unpack(stock_encode(kind.ggml_type, weights, statistics.importance(block.linear)))
            rows = QTensor(grid, (block.rows, weights.shape[1]), codes, params)
            target = writable(job)
            for chunk in target.pack(block.unit, job.architecture, block.linear.name, block.first, rows):
                output.seek(places[chunk.place.part] + chunk.place.offset)
                output.write(np.ascontiguousarray(chunk.data).data)


def measure(file: Path, reference: ReferenceLogits) -> Measures:
    longest = max(len(document.tokens) for document in reference.documents)
    with RUNTIMES.get("llama.cpp").load(file, context=longest) as session:
        return compare(answers(session, reference.documents), reference, Silent(), "")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model", nargs="?", default="demo")
    parser.add_argument("--text", default=None)
    parser.add_argument("--presets", default="Q5_K_M,Q4_K_M,Q3_K_M,Q2_K")
    parser.add_argument("--tokens", type=int, default=65536)
    options = parser.parse_args()
    checkpoint = open_checkpoint(api.model_path(options.model))
    architecture = detect(checkpoint)
    calibration = Calibration(text=options.text, tokens=options.tokens)
    splits = load_splits(source_tokenizer(checkpoint), architecture, calibration)
    measured = gather(checkpoint, architecture, calibration, splits.calibrate, Silent())
    print(f"{options.model}, {len(splits.certify)} documents of {options.text or 'the default text'}")
    print(f"{'preset':<8}{'importance':>11}{'bytes':>12}{'ours':>10}{'ggml':>10}{'ratio':>8}{'paired s.e.':>12}")
    form = rules(target("llama.cpp").format)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        runtime = TransformersRuntime(checkpoint, architecture)
        reference = ReferenceLogits(runtime, splits.certify, folder, Silent())
        for preset in options.presets.split(","):
            for statistics in (Unweighted(), measured):
                job = make_job(Model(architecture, checkpoint, checkpoint), form, Recipe(preset=preset), True)
                with Stage(folder / "out", overwrite=True) as stage:
                    execute(job, Direct(job, statistics), stage, 2, Silent())
                    ours = measure(stage.folder / "model.gguf", reference)
                    overwrite_with_stock(job, statistics, stage.folder / "model.gguf")
                    stock = measure(stage.folder / "model.gguf", reference)
                difference = np.array([a.kl - b.kl for a, b in zip(ours.per_document, stock.per_document, strict=True)])
                error = float(difference.std(ddof=1) * np.sqrt(len(difference))) / ours.tokens
                given = "no" if isinstance(statistics, Unweighted) else "yes"
                a, b = ours.mean_kl.value, stock.mean_kl.value
                size = job.layout.nbytes
                print(f"{preset:<8}{given:>11}{size:>12,}{a:>10.5f}{b:>10.5f}{a / b:>8.3f}{error:>12.1e}", flush=True)


if __name__ == "__main__":
    main()
