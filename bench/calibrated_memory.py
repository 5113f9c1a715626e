"""Peak memory of calibrated runs as the number of blocks doubles.

    python bench/calibrated_memory.py [--folder FOLDER] [--tokens 32768] [--width 1024] [--blocks 4,8,16]

Writes random Llamas, runs `anyquant make --grid int4-g128` on each with several algorithms in a process of its own, and
prints peak resident memory beside the target: two float32 blocks, the states of the calibration tokens (of the
quantized and, where an algorithm compares with it, the float model), and 1 GiB.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from synthetic import shapes, write_checkpoint

CHAINS = {"gptq": 2, "gptq, --ram 64MB": 0, "awq": 1}  # how many states of every token lie in memory
GIB = 1 << 30


def peak(model: Path, out: Path, chain: str, tokens: int) -> tuple[int, float]:
    """(peak bytes, CPU seconds) of one make."""
    algorithm, _, further = chain.partition(", ")
    arguments = ["make", str(model), "--grid", "int4-g128", "--algorithm", algorithm, "--tokens", str(tokens)]
    command = [sys.executable, "-m", "anyquant", *arguments, "-q", "-o", str(out), *further.split()]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"make failed with status {status}")
    return usage.ru_maxrss * 1024, usage.ru_utime + usage.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--tokens", type=int, default=32768)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--blocks", default="4,8,16")
    given = parser.parse_args()
    print(f"{'algorithm':<20}{'blocks':>8}{'parameters':>14}{'peak RSS':>12}{'target':>12}{'CPU s':>9}")
    for chain, kept in CHAINS.items():
        for blocks in map(int, given.blocks.split(",")):
            with tempfile.TemporaryDirectory(dir=given.folder) as temporary:
                folder = Path(temporary)
                parameters = write_checkpoint(folder / "model", given.width, 4 * given.width, blocks)
                bytes_used, seconds = peak(folder / "model", folder / "out", chain, given.tokens)
            matrices = [shape for shape in shapes(given.width, 4 * given.width, 1, 0).values() if len(shape) == 2]
            target = 8 * sum(a * b for a, b in matrices) + 4 * given.tokens * given.width * kept + GIB
            sizes = f"{bytes_used / 1e6:>9.0f} MB{target / 1e6:>9.0f} MB"
            print(f"{chain:<20}{blocks:>8}{parameters:>14,}{sizes}{seconds:>9.0f}", flush=True)


if __name__ == "__main__":
    main()
