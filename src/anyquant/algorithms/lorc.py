"""LoRC: the leading singular pairs of the quantization error are kept beside the quantized weights, without any data.

Yao et al. 2023, ZeroQuant-V2, arXiv 2303.08302, section 5.
"""

from anyquant.algorithms.base import Algorithm, Task, complete_options
from anyquant.algorithms.low_rank import DEFAULTS, corrected
from anyquant.core.qtensor import QTensor


def correct(task: Task, quantized: QTensor) -> QTensor:
    """Option `rank`. The squared error of the weights, those that were pruned included, is the least for this rank.

    Raises UsageError for another option, or a rank that the matrix does not have.
    """
    options = complete_options("lorc", task.options, DEFAULTS)
    return corrected(task, quantized, options["rank"], None, "lorc")


ALGORITHM = Algorithm("lorc", options=DEFAULTS, correct=correct)
