"""The import directions of the design: lower layers never import higher ones, siblings never each other."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "src" / "anyquant"

# lowest first; folders of one row are siblings
LAYERS = [
    {"core"},
    {"grids", "store", "models", "demo"},
    {"calibrate", "runtimes"},
    {"transforms", "algorithms", "formats", "graphs", "evaluation"},
    {"contract"},
    {"pipeline"},
    {"advisor"},
    {"cli", "web", "serve", "deploy"},
]
LEVEL = {folder: level for level, row in enumerate(LAYERS) for folder in row}
HEAVY = {"torch", "transformers", "tokenizers", "accelerate", "compressed_tensors", "bitsandbytes"}
HEAVY |= {"numba", "gguf", "xllamacpp", "onnx", "onnxruntime", "openvino", "nncf", "mlx", "mlx_lm"}


def imports(path: Path) -> list[tuple[str, bool]]:
    """(module, inside a function) of every import in a file."""
    tree = ast.parse(path.read_text())
    nested = {id(n) for f in ast.walk(tree) if isinstance(f, ast.FunctionDef) for n in ast.walk(f)}
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(alias.name, id(node) in nested) for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.append((node.module, id(node) in nested))
    return found


def folder_of(module: str) -> str | None:
    parts = module.split(".")
    return parts[1] if parts[0] == "anyquant" and len(parts) > 1 else None


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_point_downwards(path: Path) -> None:
    own = path.relative_to(PACKAGE).parts[0]
    if own not in LEVEL:
        return
    for module, _ in imports(path):
        folder = folder_of(module)
        if folder is None or folder == own or folder not in LEVEL:
            continue
        assert LEVEL[folder] < LEVEL[own], f"{path.name} in {own} imports {module}"


def test_algorithms_and_contract_know_no_grid_by_name() -> None:
    for folder in ("algorithms", "contract", "evaluation"):
        for path in (PACKAGE / folder).rglob("*.py"):
            assert not any(m.startswith("anyquant.grids.") for m, _ in imports(path)), path


def test_heavy_libraries_are_imported_through_extras() -> None:
    """Only the files whose whole purpose is a library may import it at their top; nothing light reaches those."""
    for path in PACKAGE.rglob("*.py"):
        for module, _ in imports(path):
            if module.split(".")[0] in HEAVY:
                relative = str(path.relative_to(PACKAGE))
                assert "/kernels/" in relative, f"{relative} imports {module}: use core.extras.require"
