"""A data-free INT4-g128 run to compressed-tensors, ours and llm-compressor's model-free path in turn.

    python bench/model_free.py PEER_PYTHON [--folder FOLDER] [--rounds 3]

PEER_PYTHON is the interpreter of llm-compressor's environment (`bench/peers/README.md`). A random Llama of 1.1 B
parameters is written and quantized by both with all cores, each in a process of its own, so that imports count.
Ours searches each scale for the least error, reads every byte back and compares it with the source; the peer takes the
largest weight and does neither. Per run: seconds, CPU seconds, peak memory; then the error of both, decoded here.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from synthetic import write_checkpoint

from anyquant.core.checkpoint import read_tensor
from anyquant.formats import as_model
from anyquant.store.open import open_checkpoint

SHAPE = (2048, 5632, 22, 32000)  # hidden, intermediate, blocks, vocabulary
PEER = """
import sys
from llmcompressor import model_free_ptq
model_free_ptq(sys.argv[1], sys.argv[2], scheme="W4A16", ignore=["lm_head", "model.embed_tokens"], max_workers=2,
               device="cpu")
"""


def timed(command: list[str], out: Path) -> dict[str, float]:
    """Wall and CPU seconds and peak bytes of a process that makes a new folder."""
    shutil.rmtree(out, ignore_errors=True)
    began = time.monotonic()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{' '.join(command[:4])} failed with status {status}")
    cpu = usage.ru_utime + usage.ru_stime
    return {"seconds": time.monotonic() - began, "cpu": cpu, "peak": usage.ru_maxrss * 1024}


def error(model: Path, out: Path) -> float:
    """Relative squared error of the matrices of the first and the last block."""
    source, found, noise, energy = open_checkpoint(model), as_model(open_checkpoint(out)), 0.0, 0.0
    for name in source.names():
        if "_proj" not in name or name.split(".")[2] not in ("0", str(SHAPE[2] - 1)):
            continue
        weights = read_tensor(source, name)
        noise += float(np.square(read_tensor(found, name) - weights, dtype=np.float64).sum())
        energy += float(np.square(weights, dtype=np.float64).sum())
    return noise / energy


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("peer")
    parser.add_argument("--folder", type=Path, help="where to write; needs 4 GB")
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=given.folder) as temporary:
        model, folders = Path(temporary) / "model", {name: Path(temporary) / name for name in ("ours", "peer")}
        write_checkpoint(model, *SHAPE)
        ours = [sys.executable, "-c", "from anyquant.cli.main import main; main()", "make", str(model), "-q"]
        ours += ["--for", "vllm", "--preset", "W4A16", "--data-free", "-o", str(folders["ours"])]
        peer = [given.peer, "-c", PEER, str(model), str(folders["peer"])]
        runs: dict[str, list[dict[str, float]]] = {"ours": [], "peer": []}
        for _ in range(given.rounds):
            for name, command in (("ours", ours), ("peer", peer)):
                runs[name].append(timed(command, folders[name]))
                print(json.dumps({"run": name, **{key: round(value, 1) for key, value in runs[name][-1].items()}}))
        for key in ("seconds", "cpu", "peak"):
            ratios = [one[key] / other[key] for one, other in zip(runs["ours"], runs["peer"], strict=True)]
            print(f"{key}: ratio {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})")
        print({name: f"{error(model, folder):.6f}" for name, folder in folders.items()})


if __name__ == "__main__":
    sys.exit(main())
