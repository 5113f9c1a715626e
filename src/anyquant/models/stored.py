"""What any checkpoint may hold besides weights, and what none may hold: leftovers, quantized weights, copies."""

from collections.abc import Iterable

import numpy as np

from anyquant.core.checkpoint import Checkpoint, TensorSpec
from anyquant.core.dtypes import DTYPES
from anyquant.core.errors import UnsupportedError

# End of a tensor name -> why it has no place in the model.
LEFTOVERS = {
    ".rotary_emb.inv_freq": "rotary frequencies, computed from the config",
    ".masked_bias": "a constant of old attention code",
    ".position_ids": "positions, which are counted",
}
# End of a tensor name -> the method that stores weights under such names.
QUANTIZED = {
    ".qweight": "GPTQ or AWQ",
    ".qzeros": "GPTQ or AWQ",
    ".weight_packed": "compressed-tensors",
    ".weight_scale": "compressed-tensors or FP8",
    ".weight_scale_inv": "block-wise FP8",
    ".scales": "MLX",
    ".absmax": "bitsandbytes",
    ".quant_map": "bitsandbytes",
    "_blocks": "MXFP4",
}
SHOWN = 5
COMPARED_BYTES = 1 << 22


def leftovers(names: Iterable[str]) -> dict[str, str]:
    """Tensors without a place in any model -> the reason."""
    return {name: reason for name in sorted(names) for end, reason in LEFTOVERS.items() if name.endswith(end)}


def refuse_quantized(checkpoint: Checkpoint, names: set[str]) -> None:
    """Weights that are not floating-point numbers, named by the method that stores them so."""
    marks = sorted((name, method) for name in names for end, method in QUANTIZED.items() if name.endswith(end))
    if marks:
        raise UnsupportedError(
            f"{checkpoint.location}: already quantized with {marks[0][1]} ({marks[0][0]}); "
            "start from the original floating-point weights"
        )
    for name in sorted(names):
        dtype = checkpoint.spec(name).dtype
        if dtype not in DTYPES or not DTYPES[dtype].floating:
            raise UnsupportedError(
                f"{checkpoint.location}: {name} has element type {dtype}, which does not hold weights; the checkpoint "
                "is already quantized: start from one in BF16, F16 or F32"
            )


def same_values(checkpoint: Checkpoint, left: TensorSpec, right: TensorSpec) -> bool:
    """Whether two tensors hold the same bytes; they are read piece by piece."""
    if left.shape != right.shape or left.dtype != right.dtype:
        return False
    row_bytes = max(1, left.nbytes // max(1, left.rows))
    step = max(1, COMPARED_BYTES // row_bytes)
    for start in range(0, left.rows, step):
        stop = min(left.rows, start + step)
        one, other = (np.empty((stop - start) * row_bytes, dtype=np.uint8) for _ in range(2))
        checkpoint.read_into(left.name, start, stop, one)
        checkpoint.read_into(right.name, start, stop, other)
        if not np.array_equal(one, other):
            return False
    return True


def listed(names: Iterable[str]) -> str:
    """The subject of an error: up to SHOWN names and how many there are, with its verb."""
    ordered = sorted(names)
    shown = ", ".join(ordered[:SHOWN])
    if len(ordered) == 1:
        return f"tensor {shown} is"
    more = f" and {len(ordered) - SHOWN} more" if len(ordered) > SHOWN else ""
    return f"{len(ordered)} tensors ({shown}{more}) are"
