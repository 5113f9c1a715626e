"""Every format with every grid that it holds, and every format into every other: what is written is what is read."""

from collections.abc import Iterator
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from anyquant.core.checkpoint import Checkpoint, read_tensor, read_view
from anyquant.core.errors import UnsupportedError
from anyquant.core.progress import Silent
from anyquant.core.quantized import QuantizedCheckpoint
from anyquant.formats import FORMATS, as_model, rules
from anyquant.grids import grid as find_grid
from anyquant.models.detect import detect
from anyquant.pipeline.planner import Model, make_job
from anyquant.pipeline.recipe import Calibration, Recipe
from anyquant.pipeline.run import execute
from anyquant.pipeline.transcode import EXACT, RESCALED, ROUNDED, Transcoded, transcoding
from anyquant.store.open import open_checkpoint
from anyquant.store.publish import Stage
from matrix.cases import GRIDS
from support.checkpoints import make_checkpoint
from support.folders import APART, chosen
from support.write import write

MORE = ("int4-g32", "int4-g128-asym", "int8-g128", "int8-channel", "int2-g64-f16", "fp8_e4m3-channel", "hqq4-g64")
FOLDERS = [name for name in FORMATS.names() if name != "gguf"]
# a grid on which each format can be read by the most others; engines of ModelOpt and Quark round inputs, which a test
# of weights need not
TYPICAL = {
    "compressed-tensors": "int4-g128",
    "auto-round": "int4-g128-f16",
    "awq": "int4-g128-f16",
    "gptq": "int4-g128-f16",
    "modelopt": "int4-g128",
    "quark": "mxfp4",
    "fp8": "fp8_e4m3-block",
    "mlx": "int4-g128",
    "bitsandbytes": "nf4-g64",
    "torchao": "int4-g128",
    "hqq": "int4-g64",
}


# held, but not for these weights, or not without rounded inputs
REFUSED = {
    ("mlx", "nvfp4"): "MLX stores none",
    ("modelopt", "fp8_e4m3-tensor"): "FP8 needs the scale of its inputs",
    ("quark", "int8-channel"): "runs with rounded inputs only",
}
SIGNS = {"=": EXACT, "s": RESCALED, "r": ROUNDED}
DOCUMENT = Path(__file__).parents[2] / "docs" / "formats.md"


@cache
def documented() -> dict[str, dict[str, str]]:
    """The table of docs/formats.md: a format, on its grid of TYPICAL, to each format and a sign."""
    lines = [line.strip("| ").split(" | ") for line in DOCUMENT.read_text(encoding="utf-8").splitlines()]
    (head,) = (line for line in lines if line[0] == "from, on grid")
    start = lines.index(head) + 2
    rows = [line for line in lines[start : start + len(TYPICAL)] if len(line) == len(head)]
    found = {row[0].partition(", ")[0]: dict(zip(head[1:], row[1:], strict=True)) for row in rows}
    assert [row[0] for row in rows] == [f"{form}, {grid}" for form, grid in TYPICAL.items()]
    return found


def test_the_documented_table_is_whole() -> None:
    assert {form: set(row) for form, row in documented().items()} == {key: set(FORMATS.names()) for key in FOLDERS}


def held() -> Iterator[tuple[str, str]]:
    """(format, grid) for all that a format says it holds and can plan for matrices of this size."""
    for name in FOLDERS:
        for grid in dict.fromkeys((*GRIDS, *MORE, TYPICAL[name])):
            if rules(name).holds(grid) and find_grid(grid).family != "floating":
                yield name, grid


@pytest.fixture(scope="session")
def source(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    folder = tmp_path_factory.mktemp("matrix") / "llama"
    make_checkpoint(folder, "llama")
    return open_checkpoint(folder)


def written(source: Checkpoint, form: str, grid: str, folder: Path) -> Checkpoint | None:
    """The model with its block matrices on a grid, as read back; None for what the format refuses by name."""
    architecture = detect(source)
    kept = source.spec(architecture.linears[1].view.tensor).dtype.lower()
    try:
        write(source, architecture, folder, chosen(architecture, grid, kept), form)
    except (ValueError, UnsupportedError) as error:
        if (form, grid) not in REFUSED:
            raise
        assert REFUSED[form, grid] in str(error)
        return None
    assert (form, grid) not in REFUSED
    return as_model(open_checkpoint(folder))


@pytest.mark.parametrize(("form", "grid"), list(held()))
def test_what_is_written_is_read(form: str, grid: str, source: Checkpoint, tmp_path: Path) -> None:
    """Decoded by the format's reader, each matrix has the values of its grid."""
    found = written(source, form, grid, tmp_path / "out")
    if found is None:
        return
    assert isinstance(found, QuantizedCheckpoint)
    for linear in detect(source).linears:
        if linear.role in APART:
            continue
        made = find_grid(grid)
        if made.tensor_wide:  # tied matrices share the parameters of the largest
            assert found.quantized_rows(linear.view.tensor, 0, 4).grid.name == grid
            continue
        params, codes = made.quantize(read_view(source, linear.view, 0, linear.view.rows))
        np.testing.assert_array_equal(read_tensor(found, linear.view.tensor), made.decode(codes, params))


@pytest.mark.parametrize("to", FORMATS.names())
@pytest.mark.parametrize("form", list(TYPICAL))
def test_each_into_each(form: str, to: str, source: Checkpoint, tmp_path: Path) -> None:
    """What the ledger calls exact has the same numbers in the other format, and all is as the documentation says."""
    quantized = written(source, form, TYPICAL[form], tmp_path / "from")
    assert quantized is not None
    recipe = Recipe(calibration=Calibration(data_free=True))
    whole = Model(detect(quantized), quantized, quantized)
    job = make_job(whole, rules(to), transcoding(whole, rules(to), recipe), False)
    rows = Transcoded(job)
    with Stage(tmp_path / "to") as stage:
        execute(job, rows, stage, 1, Silent())
        stage.publish()
    opened = rules(to).open(tmp_path / "to", job.architecture)
    for linear in job.architecture.linears:
        kind = rows.kinds.get(linear.name, EXACT)
        before, after = (read_view(one, linear.view, 0, linear.view.rows) for one in (quantized, opened))
        error = np.square(after - before).sum() / np.square(before).sum()
        assert error <= {EXACT: 0.0, RESCALED: 2e-5, ROUNDED: 0.03}[kind], (linear.name, kind)
    assert set(rows.kinds.values()) == {SIGNS[documented()[form][to]]}
