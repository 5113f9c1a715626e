"""Kernels compile where nothing can be cached."""

import subprocess
import sys

WITHOUT_A_PLACE = """
import numba.core.caching
numba.core.caching.CacheImpl._locator_classes = []  # what is left of them when no folder can be written
import numpy as np
from anyquant.grids.kernels.packing import nibbles_16
out = np.empty(16, dtype=np.uint8)
nibbles_16(np.arange(32, dtype=np.uint8) % 16, out, 32, 16, 0)
print(out.tolist() == [17 * j for j in range(16)])
"""


def test_kernels_work_where_no_folder_can_be_written() -> None:
    done = subprocess.run([sys.executable, "-c", WITHOUT_A_PLACE], capture_output=True, text=True, check=False)
    assert done.stdout == "True\n", done.stderr
