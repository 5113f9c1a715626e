"""From a path to a Checkpoint, or to one clear line that says what is wrong with it."""

from pathlib import Path

from anyquant.core.checkpoint import Checkpoint
from anyquant.core.errors import BadInputError, UnsupportedError
from anyquant.store.gguf import GGUFFile
from anyquant.store.manifest import MANIFEST, read_manifest
from anyquant.store.safetensors import INDEX, SafetensorsCheckpoint
from anyquant.store.state import ENTRIES, PLAN
from anyquant.store.system import SYSTEM, System

ARTIFACT = "model.gguf"  # of our own outputs, where an importance file may lie beside it
PICKLED = (".bin", ".pt", ".pth", ".ckpt")


def open_checkpoint(path: Path, system: System = SYSTEM) -> Checkpoint:
    """The model at `path`: a folder of safetensors with its config.json, or a GGUF or safetensors file.

    Raises BadInputError (missing, damaged, incomplete, unknown kind) and UnsupportedError (pickled weights).
    """
    if not path.exists():
        raise BadInputError(f"{path}: there is no such file or folder")
    if path.is_dir():
        return _open_folder(path, system)
    if path.suffix == ".gguf":
        return _open_gguf(path, system)
    if path.suffix == ".safetensors":
        return SafetensorsCheckpoint(path.parent, path.name, system)
    if path.suffix in PICKLED:
        raise _pickled(path)
    raise BadInputError(f"{path}: neither a model folder nor a .gguf or .safetensors file")


def is_state(folder: Path) -> bool:
    """Whether a folder holds a neutral quantized state rather than a model."""
    return (folder / PLAN).is_file() and (folder / ENTRIES).is_dir()


def _open_gguf(path: Path, system: System) -> GGUFFile:
    file = GGUFFile(path, system)
    parts = file.metadata.get("split.count", 1)
    if parts not in (0, 1):
        raise UnsupportedError(f"{path}: one of {parts} parts; join them first: llama-gguf-split --merge FIRST OUT")
    return file


def _open_folder(folder: Path, system: System) -> Checkpoint:
    read_manifest(folder, system)
    if is_state(folder):
        raise UnsupportedError(
            f"{folder}: a neutral quantized state, not a model with its weights; make the target from the source model"
        )
    found: dict[str, list[Path]] = {}
    for child in sorted(folder.iterdir()):
        found.setdefault(child.suffix, []).append(child)
    if ".safetensors" in found or (folder / INDEX).exists():
        if not (folder / "config.json").exists():
            raise BadInputError(f"{folder}: has weights but no config.json; is this the folder of the model?")
        checkpoint = SafetensorsCheckpoint(folder, system=system)
        _ = checkpoint.config  # damaged is refused now, not in the middle of the work
        return checkpoint
    if (folder / ARTIFACT) in found.get(".gguf", []):
        return _open_gguf(folder / ARTIFACT, system)
    if len(found.get(".gguf", [])) == 1:
        return _open_gguf(found[".gguf"][0], system)
    if ".gguf" in found:
        names = ", ".join(child.name for child in found[".gguf"][:4])
        raise BadInputError(f"{folder}: holds {len(found['.gguf'])} GGUF files ({names} ...); name one of them")
    for suffix in PICKLED:
        if suffix in found:
            raise _pickled(found[suffix][0])
    inside = [child for children in found.values() for child in children if (child / MANIFEST).is_file()]
    if inside:
        raise BadInputError(f"{folder}: holds several artifacts; name one of them: {', '.join(map(str, inside))}")
    raise BadInputError(f"{folder}: holds no weights (*.safetensors or *.gguf)")


def _pickled(path: Path) -> UnsupportedError:
    command = (
        f"import torch, safetensors.torch as s; s.save_file(torch.load('{path.name}', map_location='cpu', "
        f"weights_only=True), 'model.safetensors', {{'format': 'pt'}})"
    )
    return UnsupportedError(
        f"{path}: a pickle, which can run code when it is opened, so AnyQuant never does. If you trust its author, "
        f'convert it yourself in that folder: python -c "{command}"'
    )
