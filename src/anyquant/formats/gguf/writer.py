"""The bytes in front of a GGUF file's first tensor, built by `gguf.GGUFWriter` in memory."""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from anyquant.core.dtypes import Float32
from anyquant.core.extras import require

ALIGNMENT = 32  # GGUF_DEFAULT_ALIGNMENT


@dataclass(frozen=True)
class TensorInfo:
    """`shape` in numpy order: (rows, columns) or (length,)."""

    name: str
    ggml_type: str
    shape: tuple[int, ...]
    nbytes: int


def new_writer(arch: str) -> Any:
    """A `gguf.GGUFWriter` for the architecture `arch`, a member of gguf.MODEL_ARCH. It opens no file."""
    gguf = require("gguf")
    return gguf.GGUFWriter(None, gguf.MODEL_ARCH_NAMES[gguf.MODEL_ARCH[arch]])


def padded(size: int) -> int:
    """`size` rounded up to the alignment of tensors."""
    return -(-size // ALIGNMENT) * ALIGNMENT


def header(writer: Any, constants: Sequence[tuple[str, Float32]], tensors: Sequence[TensorInfo]) -> bytes:
    """Header, metadata, tensor table, and the data of `constants`, up to where the first of `tensors` lies.

    The constants come first in the file, so that all bytes not taken from the source lie in one prefix.
    """
    gguf = require("gguf")
    for name, values in constants:
        writer.add_tensor_info(name, values.shape, values.dtype, values.nbytes)
    for tensor in tensors:
        kind = gguf.GGMLQuantizationType[tensor.ggml_type]
        writer.add_tensor_info(tensor.name, tensor.shape, np.dtype(np.float32), tensor.nbytes, raw_dtype=kind)
    buffer = io.BytesIO()
    # what open_output_file would do, with memory in place of a file
    writer.fout = [buffer]
    writer.state = gguf.gguf_writer.WriterState.EMPTY
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    data = buffer.getvalue()
    data += bytes(padded(len(data)) - len(data))
    for _, values in constants:
        raw = np.ascontiguousarray(values, dtype="<f4").tobytes()
        data += raw + bytes(padded(len(raw)) - len(raw))
    return data


def place(start: int, tensors: Sequence[TensorInfo]) -> tuple[list[int], int]:
    """Offsets of the tensors from the start of the file, and the size of the file; each tensor is padded."""
    offsets = []
    for tensor in tensors:
        offsets.append(start)
        start += padded(tensor.nbytes)
    return offsets, start
