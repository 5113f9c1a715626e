"""Peak memory of a data-free run as the model, and as its largest tensor, doubles.

    python bench/memory.py [--folder FOLDER] [--largest 1.0]

Writes random checkpoints, runs `anyquant make --preset Q4_K_M --data-free` on each in a process of its own, and prints
peak resident memory, CPU seconds and weights per CPU second. The target: at most 500 MB, flat within 5 %.
"""

import argparse
import os
import resource
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from synthetic import write_checkpoint

CASES = (
    # name, billions of parameters, hidden, intermediate, blocks, vocabulary
    ("0.02 B, first run: may compile", 0.02, 1024, 2048, 2, 2048),
    ("0.25 B", 0.25, 1024, 4096, 16, 2048),
    ("0.5 B", 0.5, 1024, 4096, 33, 2048),
    ("0.5 B, largest tensor twice", 0.5, 1024, 8192, 18, 2048),
    ("0.5 B, largest tensor 8 times", 0.5, 1024, 4096, 25, 65536),
    ("1 B", 1.0, 1024, 4096, 65, 2048),
)

WARM = 0.1  # the first, small model is there to fill the cache of compiled kernels; its peak is shown, not compared

GUARD = "import sys; sys.modules['torch'] = None; from anyquant.cli.main import main; main()"


def run(model: Path, out: Path) -> tuple[int, float]:
    """(peak bytes, CPU seconds) of one make in a fresh process in which importing torch would fail."""
    arguments = ["make", str(model), "--for", "llama.cpp", "--preset", "Q4_K_M", "--data-free", "-q", "-o", str(out)]
    process = subprocess.Popen([sys.executable, "-c", GUARD, *arguments], stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"make failed with status {status}")
    return usage.ru_maxrss * 1024, usage.ru_utime + usage.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--folder", type=Path, default=None, help="where to write; needs 3 GB per billion parameters")
    parser.add_argument("--largest", type=float, default=1.0, help="billions of parameters at most")
    options = parser.parse_args()
    print(f"{'model':<32}{'parameters':>14}{'peak RSS':>12}{'CPU s':>8}{'Mw / CPU s':>12}")
    peaks = []
    for name, size, hidden, intermediate, blocks, vocabulary in CASES:
        if size > options.largest:
            continue
        with tempfile.TemporaryDirectory(dir=options.folder) as temporary:
            folder = Path(temporary)
            parameters = write_checkpoint(folder / "model", hidden, intermediate, blocks, vocabulary)
            peak, seconds = run(folder / "model", folder / "out")
            shutil.rmtree(folder / "out")
        if size > WARM:
            peaks.append(peak)
        rate = parameters / 1e6 / seconds
        print(f"{name:<32}{parameters:>14,}{peak / 1e6:>9.0f} MB{seconds:>8.1f}{rate:>12.1f}", flush=True)
    print(f"largest / smallest peak {max(peaks) / min(peaks):.3f}; own process {_own() / 1e6:.0f} MB")


def _own() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    main()
