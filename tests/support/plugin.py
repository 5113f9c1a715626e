"""A package that registers something, as if pip had installed it."""

from pathlib import Path


def install(folder: Path, module: str, group: str, points: dict[str, str], code: str) -> None:
    """A distribution in `folder`, to be put on sys.path: `module` with `code`, and name -> attribute of it."""
    info = folder / f"{module}-1.0.dist-info"
    info.mkdir(parents=True)
    (folder / f"{module}.py").write_text(code)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {module}\nVersion: 1.0\n")
    lines = [f"{name} = {module}:{attribute}" for name, attribute in points.items()]
    (info / "entry_points.txt").write_text("\n".join([f"[{group}]", *lines, ""]))
