"""Same top token: does the candidate's most likely next token belong to the reference's most likely ones?"""

from typing import Any

import numpy as np
import numpy.typing as npt


def same_top(reference: npt.NDArray[Any], candidate: npt.NDArray[Any]) -> npt.NDArray[np.bool_]:
    """Per position, from logits or log probabilities (positions, vocabulary).

    Where the reference has several equal largest values (logits kept as float16 do), each of them counts as its top.
    """
    top = candidate.argmax(axis=-1)
    chosen = np.take_along_axis(reference, top[:, None], axis=-1)[:, 0]
    agreed: npt.NDArray[np.bool_] = chosen == reference.max(axis=-1)
    return agreed
