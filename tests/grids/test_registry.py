"""The grid registry: every listed name loads, unknown ones are refused, plug-ins are found, nothing heavy is loaded."""

import subprocess
import sys
from importlib.metadata import EntryPoint

import pytest

import anyquant.grids
from anyquant.core.errors import AnyQuantError, UsageError
from anyquant.core.grid import Grid
from anyquant.grids import floating, grid, names


def test_names_and_families_agree() -> None:
    assert {"f32", "bf16", "q8_0", "q4_k", "int4-g128"} <= set(names())
    assert len(set(names())) == len(names())
    for name in names():
        found = grid(name)
        assert isinstance(found, Grid) and found.name == name
        assert found is grid(name)


@pytest.mark.parametrize("name", ["q4_2", "int4-g100", "int9-g64", "q4_K", "", "q8_0 "])
def test_an_unknown_name_is_refused_with_the_nearest_ones(name: str) -> None:
    with pytest.raises(UsageError, match="unknown grid"):
        grid(name)


def test_the_refusal_suggests() -> None:
    with pytest.raises(UsageError, match=r"did you mean .*q4_0"):
        grid("q4_00")


def test_the_refusal_of_something_else_names_one_of_each_kind() -> None:
    with pytest.raises(UsageError) as refused:
        grid("zzz")
    said = str(refused.value)
    assert len(said) < 200
    for name in ("f32", "q8_0", "q2_k", "mxfp4"):
        assert name in said


def test_a_plug_in_is_found_by_its_entry_point(monkeypatch: pytest.MonkeyPatch) -> None:
    points = [
        EntryPoint("mine", "tests_plugin:GRID", anyquant.grids.GROUP),
        EntryPoint("broken", "tests_plugin:NOT_A_GRID", anyquant.grids.GROUP),
    ]

    def entry_points(group: str, name: str | None = None) -> list[EntryPoint]:
        return [point for point in points if group == anyquant.grids.GROUP and name in (None, point.name)]

    plugin = type(sys)("tests_plugin")
    plugin.GRID, plugin.NOT_A_GRID = floating.make("f16"), 3  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "tests_plugin", plugin)
    monkeypatch.setattr(anyquant.grids, "entry_points", entry_points)
    try:
        assert "mine" in names() and grid("mine") is plugin.GRID  # type: ignore[attr-defined]
        with pytest.raises(AnyQuantError, match="broken"):
            grid("broken")
    finally:
        grid.cache_clear()


def test_looking_up_a_grid_loads_neither_numba_nor_torch() -> None:
    code = (
        "import sys\n"
        "from anyquant.grids import grid\n"
        "from anyquant.formats.gguf.layouts import layout\n"
        "[(grid(n).bits((2, 512)), layout(n)) for n in ('f16', 'q8_0', 'q4_1', 'q4_k', 'q6_k')]\n"
        "grid('int4-g128')\n"
        "print({'numba', 'torch', 'gguf'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
