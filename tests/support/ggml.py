"""ggml's own encoder, through the C symbols of the pinned xllamacpp wheel: the stock quantizer to compare with."""

import ctypes
import functools
from pathlib import Path

import gguf
import numpy as np
import numpy.typing as npt


@functools.cache
def library() -> ctypes.CDLL:
    import xllamacpp

    shared = next(Path(xllamacpp.__file__).parent.glob("*.so"))
    lib = ctypes.CDLL(str(shared))
    lib.ggml_quantize_chunk.restype = ctypes.c_size_t
    lib.ggml_quantize_chunk.argtypes = [
        ctypes.c_int,
        ctypes.c_void_p,
        ctypes.c_void_p,
        ctypes.c_int64,
        ctypes.c_int64,
        ctypes.c_int64,
        ctypes.c_void_p,
    ]
    return lib


def stock_encode(
    ggml_type: str, weights: npt.NDArray[np.float32], importance: npt.NDArray[np.float32] | None = None
) -> npt.NDArray[np.uint8]:
    """`weights` (rows, in) as ggml encodes them: uint8 (rows, bytes per row). `importance` has shape (in,)."""
    kind = gguf.GGMLQuantizationType[ggml_type]
    block, size = gguf.GGML_QUANT_SIZES[kind]
    rows, columns = weights.shape
    source = np.ascontiguousarray(weights, dtype=np.float32)
    out = np.empty((rows, columns // block * size), dtype=np.uint8)
    steering = None if importance is None else np.ascontiguousarray(importance, dtype=np.float32)
    written = library().ggml_quantize_chunk(
        int(kind),
        source.ctypes.data,
        out.ctypes.data,
        0,
        rows,
        columns,
        None if steering is None else steering.ctypes.data,
    )
    if written != out.nbytes:
        raise RuntimeError(f"ggml wrote {written} bytes, expected {out.nbytes}")
    return out


def stock_decode(ggml_type: str, raw: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
    """gguf-py's own reader: uint8 (rows, bytes per row) to float32 (rows, in)."""
    return gguf.quants.dequantize(raw, gguf.GGMLQuantizationType[ggml_type])
