"""Record which type llama.cpp's own quantizer gives every tensor: golden tables for tests/formats/test_gguf_presets.py.

    python tools/record_presets.py FOLDER

FOLDER holds the shared objects of the npm package @node-llama-cpp/linux-x64 (bins/linux-x64), version 3.22.1: its
libllama exports `llama_model_quantize`. The choice of types looks at the model's settings and at tensor names and row
lengths only, so tensors of two rows are enough. Writes tests/golden/presets/*.json, one file per model shape.
"""

import ctypes
import itertools
import json
import struct
import sys
import tempfile
import tomllib
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np

ROOT = Path(__file__).parent.parent
GOLDEN = ROOT / "tests" / "golden" / "presets"
PRESETS = ROOT / "src" / "anyquant" / "formats" / "gguf" / "presets.toml"
ROWS = 2
WITH = " with importance"


@dataclass(frozen=True)
class Shape:
    """What the choice of types may depend on. `hidden` and `ffn` are the row lengths of the tensors."""

    name: str
    family: str
    blocks: int
    heads: int = 8
    kv_heads: int = 8
    hidden: int = 256
    ffn: int = 512
    experts: int = 0
    tied: bool = False
    fused: bool = False


SHAPES = (
    Shape("llama-32-gqa1", "llama", 32),
    Shape("llama-32-gqa4-tied", "llama", 32, kv_heads=2, tied=True),
    Shape("llama-6-gqa2", "llama", 6, kv_heads=4),
    Shape("llama-17-gqa8-tied", "llama", 17, kv_heads=1, tied=True),
    Shape("llama-1-gqa1", "llama", 1),
    Shape("llama-47-gqa3", "llama", 47, heads=6, kv_heads=2, hidden=768),
    Shape("llama-80-gqa8", "llama", 80, kv_heads=1),
    Shape("llama-80-gqa1-tied", "llama", 80, tied=True),
    Shape("qwen2-80-gqa8", "qwen2", 80, kv_heads=1),
    Shape("qwen2-80-gqa1", "qwen2", 80),
    Shape("qwen3-80-gqa8", "qwen3", 80, kv_heads=1),
    Shape("qwen3-36-gqa4-tied", "qwen3", 36, kv_heads=2, tied=True),
    Shape("phi3-32-fused", "phi3", 32, fused=True),
    Shape("phi3-80-gqa4-fused", "phi3", 80, kv_heads=2, fused=True),
    Shape("llama-9-width-320", "llama", 9, kv_heads=4, hidden=320, ffn=352),
    Shape("llama-9-width-320-tied", "llama", 9, kv_heads=1, hidden=320, ffn=512, tied=True),
    Shape("llama-9-ffn-336", "llama", 9, kv_heads=4, ffn=336),
    Shape("llama-32-8-experts", "llama", 32, kv_heads=2, experts=8),
    Shape("llama-17-8-experts-gqa1", "llama", 17, experts=8, tied=True),
    Shape("llama-17-4-experts", "llama", 17, kv_heads=2, experts=4),
)


def tensors(shape: Shape) -> dict[str, tuple[int, ...]]:
    """GGUF tensor name to its shape, row length last."""
    attention = ("attn_qkv",) if shape.fused else ("attn_q", "attn_k", "attn_v")
    found: dict[str, tuple[int, ...]] = {"token_embd.weight": (ROWS, shape.hidden)}
    for block in range(shape.blocks):
        for name in (*attention, "attn_output"):
            found[f"blk.{block}.{name}.weight"] = (ROWS, shape.hidden)
        if shape.experts:
            found[f"blk.{block}.ffn_gate_inp.weight"] = (shape.experts, shape.hidden)
        for name in ("ffn_up", "ffn_down") if shape.fused else ("ffn_gate", "ffn_up", "ffn_down"):
            width = shape.ffn if name == "ffn_down" else shape.hidden
            experts = (shape.experts,) if shape.experts else ()
            found[f"blk.{block}.{name}{'_exps' if shape.experts else ''}.weight"] = (*experts, ROWS, width)
    if not shape.tied:
        found["output.weight"] = (ROWS, shape.hidden)
    return found


def write_model(path: Path, shape: Shape) -> None:
    """A model in F16 with the settings that the quantizer reads (the router, as converters leave it, in F32)."""
    writer = gguf.GGUFWriter(str(path), shape.family)
    writer.add_context_length(512)
    writer.add_embedding_length(shape.hidden)
    writer.add_block_count(shape.blocks)
    writer.add_feed_forward_length(shape.ffn)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.kv_heads)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(shape.hidden // shape.heads)
    writer.add_vocab_size(ROWS)
    if shape.experts:
        writer.add_expert_count(shape.experts)
        writer.add_expert_used_count(2)
    random = np.random.default_rng(0)
    for name, size in tensors(shape).items():
        kind = np.float32 if "ffn_gate_inp" in name else np.float16
        writer.add_tensor(name, random.standard_normal(size).astype(kind))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


class Quantizer:
    """`llama_model_quantize` with the layout of its parameters in llama.cpp v0.5.0 (include/llama.h)."""

    THREADS, FILE_TYPE, IMATRIX = 0, 4, 24

    def __init__(self, folder: Path) -> None:
        for name in ("libggml-base.so", "libggml.*.so"):
            ctypes.CDLL(str(next(folder.glob(name))), mode=ctypes.RTLD_GLOBAL)
        self.library = ctypes.CDLL(str(next(folder.glob("libllama.*.so"))))
        self.blob = ctypes.c_uint8 * 1024
        self.messages: list[str] = []
        self.logger = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)(self.receive)
        self.library.llama_log_set(self.logger, None)
        self.library.llama_version.restype = ctypes.c_char_p

        class Defaults(ctypes.Structure):
            _fields_ = (("raw", self.blob),)

        self.library.llama_model_quantize_default_params.restype = Defaults
        found = struct.unpack_from("<4i", bytes(self.library.llama_model_quantize_default_params().raw))
        if found != (0, 7, 43, 43):
            raise SystemExit(f"unexpected quantization defaults {found}: another llama.cpp version?")

    def receive(self, level: int, text: bytes | None, _data: int | None) -> None:
        if level == 4:
            self.messages.append((text or b"").decode("utf-8", "replace").strip())

    def run(self, source: Path, target: Path, file_type: int, importance: dict[str, Any] | None) -> bool:
        """False when llama.cpp refuses; `messages` then says why."""
        self.messages.clear()
        raw = bytearray(bytes(self.library.llama_model_quantize_default_params().raw))
        struct.pack_into("<i", raw, self.THREADS, 1)
        struct.pack_into("<i", raw, self.FILE_TYPE, file_type)
        kept: list[Any] = []
        if importance is not None:
            entries = bytearray()
            for name, values in importance.items():
                text = ctypes.create_string_buffer(name.encode())
                kept += [text, values]
                entries += struct.pack("<3Q", ctypes.addressof(text), values.ctypes.data, values.size)
            table = ctypes.create_string_buffer(bytes(entries) + bytes(24))
            kept.append(table)
            struct.pack_into("<Q", raw, self.IMATRIX, ctypes.addressof(table))
        params = self.blob.from_buffer(raw)
        return bool(
            self.library.llama_model_quantize(str(source).encode(), str(target).encode(), ctypes.byref(params)) == 0
        )


def importance_of(shape: Shape) -> dict[str, Any]:
    """One positive value per column, and expert, of every block tensor."""
    return {
        name: np.linspace(1, 2, size[-1] * (size[0] if len(size) == 3 else 1), dtype=np.float32)
        for name, size in tensors(shape).items()
        if name.startswith("blk.")
    }


def compact(types: dict[str, str]) -> dict[str, str]:
    """Types by tensor, run-length coded over the blocks: {"blk.*.attn_v.weight": "q6_k*4 q4_k*2 ..."}."""
    columns: dict[str, list[str]] = {}
    for name, kind in types.items():
        place = "blk.*." + name.split(".", 2)[2] if name.startswith("blk.") else name
        columns.setdefault(place, []).append(kind)
    return {
        place: " ".join(f"{kind}*{len(list(run))}" for kind, run in itertools.groupby(kinds))
        for place, kinds in columns.items()
    }


def record(quantizer: Quantizer, shape: Shape, folder: Path) -> dict[str, Any]:
    source, target = folder / "source.gguf", folder / "target.gguf"
    write_model(source, shape)
    file_types = {name: row["file_type"] for name, row in tomllib.loads(PRESETS.read_text())["preset"].items()}
    tables: dict[str, Any] = {}
    for name, file_type in file_types.items():
        for importance in (False, True):
            key = name + WITH * importance
            if not quantizer.run(source, target, file_type, importance_of(shape) if importance else None):
                tables[key] = {"refused": quantizer.messages[-1] if quantizer.messages else ""}
                continue
            reader = gguf.GGUFReader(target)
            types = {tensor.name: tensor.tensor_type.name.lower() for tensor in reader.tensors}
            if types.keys() != tensors(shape).keys():
                raise SystemExit(f"{shape.name}, {key}: the quantizer changed the set of tensors")
            tables[key] = compact({tensor: types[tensor] for tensor in tensors(shape)})
    differing = {
        name: table
        for name, table in tables.items()
        if not name.endswith(WITH) or table != tables[name.removesuffix(WITH)]
    }
    return {"shape": asdict(shape), "tables": differing}


def main() -> None:
    if len(sys.argv) != 2:
        raise SystemExit(__doc__)
    quantizer = Quantizer(Path(sys.argv[1]))
    version = quantizer.library.llama_version().decode()
    GOLDEN.mkdir(parents=True, exist_ok=True)
    for shape in SHAPES:
        with tempfile.TemporaryDirectory() as folder:
            table = {"recorded_from": f"llama_model_quantize of llama.cpp {version}"}
            table |= record(quantizer, shape, Path(folder))
        (GOLDEN / f"{shape.name}.json").write_text(json.dumps(table, indent=1) + "\n")
        sys.stdout.write(f"{shape.name}: {len(table['tables'])} tables\n")


if __name__ == "__main__":
    main()
