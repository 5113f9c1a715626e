"""CPU seconds of a calibrated GPTQ, ours and llm-compressor's in turn, on the same tokens and threads.

    python bench/gptq_speed.py PEER_PYTHON --text TEXT [--model MODEL] [--width 4096] [--rounds 3]

PEER_PYTHON is the interpreter of llm-compressor's environment (`bench/peers/README.md`). Without a model it is one
block of random weights, `--width` wide. Each run is a process of its own; seconds are those of calibrating and
quantizing, imports and reading the checkpoint's header aside. Ours: `plain` is GPTQ as the peer has it (one pass of
error feedback for the inputs of the quantized model), `default` also aims at the float model's outputs.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
GRID = "int4-g128"
OURS = {"plain": ["--option", 'propagation="none"', "--option", "refine=0"], "default": []}


def last_line(command: list[str], threads: int) -> dict[str, Any]:
    """The JSON line at the end of what a command prints."""
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS")
    environment = {**os.environ, **dict.fromkeys(names, str(threads)), "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\n{done.stderr[-2000:]}")
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def commands(given: argparse.Namespace, model: Path, folder: Path, dtype: str) -> dict[str, list[str]]:
    """What is compared, by name."""
    common = ["--shape", given.shape, "--dtype", dtype]
    ours = [sys.executable, str(HERE / "algorithms.py"), str(model), "--calibrate", given.text, "--grids", GRID]
    peer = [given.peer, str(HERE / "peers" / "run_llm_compressor.py"), "--model", str(model), "--text", given.text]
    peer += ["--grid", GRID, "--method", "gptq", "--threads", str(given.threads), "--out", str(folder / "peer")]
    found = {name: [*ours, "--algorithms", "gptq", *options, *common] for name, options in OURS.items()}
    return {**found, "llm-compressor": [*peer, *common]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("peer")
    parser.add_argument("--text", required=True)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--width", type=int, default=4096)
    parser.add_argument("--shape", default="128x256", help="windows x tokens of calibration")
    parser.add_argument("--dtypes", default="float32,bfloat16")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder, model = Path(temporary), given.model
        if model is None:
            from synthetic import write_checkpoint

            model = folder / "model"
            write_checkpoint(model, given.width, given.width * 43 // 16 // 256 * 256, 1)
        for dtype in given.dtypes.split(","):
            seconds: dict[str, list[float]] = {}
            for name in OURS:  # the first run on a machine compiles kernels
                last_line(commands(given, model, folder, dtype)[name], given.threads)
            for _ in range(given.rounds):
                for name, command in commands(given, model, folder, dtype).items():
                    seconds.setdefault(name, []).append(last_line(command, given.threads)["cpu_seconds"])
                    print(f"{dtype} {name} {seconds[name][-1]}", file=sys.stderr, flush=True)
            peer = seconds["llm-compressor"]
            for name, found in seconds.items():
                ratio = statistics.median(theirs / mine for theirs, mine in zip(peer, found, strict=True))
                line = {"dtype": dtype, "name": name, "cpu_seconds": statistics.median(found), "times faster": ratio}
                print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
