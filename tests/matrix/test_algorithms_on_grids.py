"""Every algorithm on every grid: what must hold whatever the two are."""

from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from algorithms.slow_feedback import loss
from anyquant.algorithms import ALGORITHMS
from anyquant.algorithms.base import Task
from anyquant.core.dtypes import Float32
from anyquant.core.errors import UnsupportedError
from anyquant.core.grid import Grid
from anyquant.core.qtensor import QTensor
from anyquant.formats.compressed_tensors.layouts import layout as tensors_layout
from anyquant.formats.gguf.layouts import layout as gguf_layout
from anyquant.grids import FAMILIES
from anyquant.grids import grid as find_grid
from anyquant.store.state import StateWriter, entry_key
from matrix.cases import (
    ALGORITHM_OPTIONS,
    GRIDS,
    PAIRS,
    applies,
    cut,
    keep_of,
    quantize,
    result_of,
    row_step,
    same,
    task_of,
)

on_every_grid = pytest.mark.parametrize("grid_name", GRIDS)
on_the_whole_product = pytest.mark.parametrize(("algorithm", "grid_name"), PAIRS)


def test_nothing_is_left_out() -> None:
    algorithms = [ALGORITHMS.get(name) for name in ALGORITHMS.names()]
    assert {one.name for one in algorithms if one.quantize or one.tune} == set(ALGORITHM_OPTIONS)
    assert {type(find_grid(name)).__module__ for name in GRIDS} == {
        family.module for family in FAMILIES if family.names
    }


@on_the_whole_product
def test_codes_and_parameters_are_what_the_grid_declares(algorithm: str, grid_name: str) -> None:
    found, grid = result_of(algorithm, grid_name), find_grid(grid_name)
    assert found.grid is grid and found.shape == task_of(grid_name).shape
    assert found.params.keys() == {parameter.name for parameter in grid.parameters}
    assert _fits(found.codes, grid.code_bits)
    for parameter in grid.parameters:
        assert _fits(found.params[parameter.name], parameter.bits), parameter.name
    decoded = found.decode()
    assert decoded.dtype == np.float32 and decoded.shape == found.shape and np.isfinite(decoded).all()


def _fits(array: np.ndarray, bits: int) -> bool:
    """Whether no value needs more bits than are paid for."""
    if array.dtype == np.float32 and bits == 16:
        bfloat16 = not (array.view(np.uint32) & 0xFFFF).any()
        return bfloat16 or np.array_equal(array.astype(np.float16).astype(np.float32), array)
    if array.dtype.kind == "f":
        return bits == 8 * array.dtype.itemsize and bool(np.isfinite(array).all())
    wide = array.astype(np.int64)
    lowest = -(1 << bits - 1) if array.dtype.kind == "i" else 0
    return bool(lowest <= wide.min() and wide.max() < lowest + (1 << bits))


@on_the_whole_product
def test_values_of_the_grid_stay_where_they_are(algorithm: str, grid_name: str) -> None:
    found, grid = result_of(algorithm, grid_name), find_grid(grid_name)
    values = found.decode()
    np.testing.assert_array_equal(grid.decode(grid.encode(values, found.params), found.params), values)
    width = np.lcm.reduce([grid.vector, 16])
    for columns in (slice(0, int(width)), slice(int(width), 4 * int(width))):
        part = grid.encode(np.ascontiguousarray(values[:, columns]), found.params, columns)
        np.testing.assert_array_equal(grid.decode(part, found.params, columns), values[:, columns])


@on_the_whole_product
def test_the_same_again(algorithm: str, grid_name: str) -> None:
    task = task_of(grid_name)
    assert task.stats is not None
    afresh = replace(task, weights=task.weights.copy(), stats=replace(task.stats, _memo={}))
    assert same(quantize(algorithm, afresh), result_of(algorithm, grid_name))


@pytest.mark.parametrize("algorithm", ["rtn", "hqq"])
@on_every_grid
def test_slices_of_rows_are_the_rows_of_the_whole(algorithm: str, grid_name: str) -> None:
    assert ALGORITHMS.get(algorithm).rows_apart
    step = row_step(find_grid(grid_name))
    rows = 8 if step == 1 else step + 12
    task = task_of(grid_name, rows=rows)
    whole = quantize(algorithm, task)
    for start, stop in ((0, 3), (3, 8)) if step == 1 else ((0, step), (step, rows)):
        part = quantize(algorithm, replace(task, weights=task.weights[start:stop]))
        assert same(part, cut(whole, start, stop))


def output_error(task: Task, values: Float32) -> float:
    assert task.stats is not None and task.stats.hessian is not None
    return loss(task.weights - values, task.stats.hessian)


def weighted_error(task: Task, values: Float32) -> float:
    weighting = task.grid.weighting(task.weights, task.importance).astype(np.float64)
    return float((weighting * (task.weights - values.astype(np.float64)) ** 2).sum())


def sparse_error(task: Task, values: Float32) -> float:
    return float((np.abs(task.weights - values.astype(np.float64)) ** 0.7).sum())


# what an algorithm makes small
MEASURES = {"rtn": weighted_error, "hqq": sparse_error}


@on_the_whole_product
@pytest.mark.parametrize("kind", ["usual", "constant", "uneven", "pruned"])
def test_no_worse_than_plain_rounding_by_its_own_measure(algorithm: str, grid_name: str, kind: str) -> None:
    task = task_of(grid_name, "usual" if kind == "pruned" else kind)
    task = replace(task, keep=keep_of(task.shape) if kind == "pruned" else None)
    found = result_of(algorithm, grid_name) if kind == "usual" else quantize(algorithm, task)
    values = found.decode()
    assert np.isfinite(values).all()
    plain = quantize("rtn", task).decode() if algorithm == "autoround" else _plain(task, searched=algorithm == "hqq")
    measure = MEASURES.get(algorithm, output_error)
    # scales are stored in few bits, so of equal weights a last trace may be left
    trace = 1e-4 * measure(task, np.zeros_like(plain)) if kind == "constant" else 0
    assert measure(task, values) <= measure(task, plain) * (1 + 1e-5) + trace


def _plain(task: Task, searched: bool) -> Float32:
    """Rounded with scales that just cover the range, or those of the grid's own search."""
    weights = task.weights if task.keep is None else np.where(task.keep, task.weights, np.float32(0))
    params = task.grid.fit(weights, None, task.shared) if searched else task.grid.plain(weights, task.shared)
    values = task.grid.decode(task.grid.encode(weights, params), params)
    return values if task.keep is None else np.where(task.keep, values, np.float32(0))


@on_the_whole_product
def test_nothing_comes_of_nothing(algorithm: str, grid_name: str) -> None:
    assert not quantize(algorithm, task_of(grid_name, "zero")).decode().any()


@on_every_grid
def test_error_feedback_and_tuning_pay(grid_name: str) -> None:
    """On the output, where channels go together."""
    task = task_of(grid_name)
    rounded, fed_back, tuned = (
        output_error(task, result_of(name, grid_name).decode()) for name in ("rtn", "gptq", "autoround")
    )
    if grid_name == "f32":
        assert fed_back <= rounded == 0
    else:
        assert fed_back < 0.6 * rounded
    assert tuned <= rounded
    if find_grid(grid_name).code_bits < 8:  # beyond that the few steps taken here may be too coarse
        assert tuned < 0.97 * rounded


@on_the_whole_product
def test_what_was_pruned_is_zero(algorithm: str, grid_name: str) -> None:
    task = task_of(grid_name)
    keep = keep_of(task.shape)
    found = quantize(algorithm, replace(task, keep=keep))
    values = found.decode()
    assert [correction.kind for correction in found.corrections] == ["mask"]
    assert not values[~keep].any() and np.isfinite(values).all()


@on_the_whole_product
@pytest.mark.parametrize("corrected", [False, True], ids=["plain", "corrected"])
def test_the_state_holds_it(algorithm: str, grid_name: str, corrected: bool, tmp_path: Path) -> None:
    """Byte for byte, in whatever slices it is written and read."""
    found = result_of(algorithm, grid_name)
    if corrected:
        found = _with_corrections(task_of(grid_name), found)
    key = entry_key("source", {"algorithm": algorithm, "grid": grid_name}, "", "1")
    stored = []
    step = max(row_step(found.grid), 3)
    for name, cuts in {"whole": (0, 8), "slices": (*range(0, 8, step), 8)}.items():
        with StateWriter(tmp_path / name) as state:
            with state.begin(key, found.grid, found.shape) as entry:
                for start, stop in reversed(list(pairwise(cuts))):
                    entry.write(start, cut(found, start, stop))
            reader = state.read(key, find_grid)
            reader.verify()
            assert same(reader.load(), found)
            np.testing.assert_array_equal(reader.load().decode(), found.decode())
            for start, stop in pairwise(cuts):
                assert same(reader.rows(start, stop), cut(found, start, stop))
        stored.append((tmp_path / name / "entries" / f"{key}.safetensors").read_bytes())
    assert stored[0] == stored[1]


def _with_corrections(task: Task, found: QTensor) -> QTensor:
    """Pruned and with a low-rank pair."""
    prune, correct = ALGORITHMS.get("wanda").prune, ALGORITHMS.get("eora").correct
    assert prune is not None and correct is not None
    masked = ALGORITHMS.get("rtn").quantize
    assert masked is not None
    pruned = replace(found, corrections=masked(replace(task, keep=prune(task))).corrections)
    return correct(replace(task, options={"rank": 3}), pruned)


@on_every_grid
def test_bits_are_those_that_a_format_writes(grid_name: str) -> None:
    grid, found = find_grid(grid_name), result_of("rtn", grid_name)
    written = _written(grid, found)
    if written is None:
        assert grid.family not in ("floating", "legacy", "kquant", "iquant")
        assert grid_name != "int4-g128"
    else:
        assert 8 * written == grid.bits(found.shape)


def _written(grid: Grid, found: QTensor) -> int | None:
    """Bytes of the matrix in the first format that holds the grid, read back on the way; None where there is none."""
    try:
        rows = gguf_layout(grid.name)
    except UnsupportedError:
        pass
    else:
        raw = rows.pack(found.codes, found.params)
        assert raw.shape == (found.shape[0], rows.row_bytes(found.shape[1]))
        params, codes = rows.unpack(raw)
        assert same(QTensor(grid, found.shape, codes, params), found)
        return raw.nbytes
    try:
        layout = tensors_layout(grid.name)
    except UnsupportedError:
        return None
    arrays = layout.pack(found, found.shape)
    assert same(layout.unpack([array.reshape(-1) for array in arrays], found.shape[0], found.shape), found)
    stored = zip(layout.tensors(*found.shape), arrays, strict=True)
    return sum(array.nbytes for one, array in stored if one.suffix != "weight_shape")


# shapes at whose edges blocks are partial, or a row is one group
SHAPES = {
    "fp8_e4m3-block": (130, 200),
    "fp8_e4m3-channel": (5, 37),
    "int4-channel": (3, 100),
    "int8-tensor": (3, 100),
    "codebook3": (5, 37),
    "f16": (1, 5),
    "q8_0": (1, 32),
    "mxfp4": (1, 32),
    "nvfp4": (3, 48),
    "int4-g256": (2, 256),
    "nf4-g64-double": (3, 192),
}


@pytest.mark.parametrize(
    ("algorithm", "grid_name"),
    [(algorithm, name) for algorithm in ALGORITHM_OPTIONS for name in SHAPES if applies(algorithm, name)],
)
def test_odd_shapes(algorithm: str, grid_name: str) -> None:
    rows, columns = SHAPES[grid_name]
    task = task_of(grid_name, rows=rows, columns=columns)
    values = quantize(algorithm, task).decode()
    assert values.shape == (rows, columns) and np.isfinite(values).all()
    assert np.square(values - task.weights).sum() < 0.2 * np.square(task.weights).sum()
