"""LoRC: the leading singular pairs of the quantization error are kept beside the quantized weights, without any data.

Yao et al. 2023, ZeroQuant-V2, arXiv 2303.08302, section 5.
"""

from functools import partial

from anyquant.algorithms.base import Algorithm, Task
from anyquant.algorithms.low_rank import DEFAULTS, checked_rank, corrected
from anyquant.core.qtensor import QTensor


def correct(task: Task, quantized: QTensor) -> QTensor:
    """Option `rank`. The squared error of the weights, those that were pruned included, is the least for this rank.

    Raises UsageError for another option, or a rank that the matrix does not have.
    """
    return corrected(task, quantized, checked_rank("lorc", task), None)


ALGORITHM = Algorithm("lorc", options=DEFAULTS, correct=correct, check=partial(checked_rank, "lorc"))
