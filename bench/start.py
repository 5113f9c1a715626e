"""How long the command line takes to answer, against a bare interpreter in the same run.

    python bench/start.py

Target: `anyquant --help` under 0.3 s.
"""

import statistics
import subprocess
import sys
import time

ROUNDS = 9
COMMANDS = {
    "python -c pass": [sys.executable, "-c", "pass"],
    "import anyquant": [sys.executable, "-c", "import anyquant"],
    "anyquant --help": [sys.executable, "-m", "anyquant.cli.main", "--help"],
    "anyquant make --help": [sys.executable, "-m", "anyquant.cli.main", "make", "--help"],
    "anyquant inspect demo": [sys.executable, "-m", "anyquant.cli.main", "inspect", "demo"],
    "anyquant plan demo": [sys.executable, "-m", "anyquant.cli.main", "plan", "demo", "--for", "llama.cpp"],
}


def seconds(command: list[str]) -> float:
    began = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - began


def main() -> None:
    times: dict[str, list[float]] = {name: [] for name in COMMANDS}
    for _ in range(ROUNDS):
        for name, command in COMMANDS.items():
            times[name].append(seconds(command))
    bare = statistics.median(times["python -c pass"])
    print(f"{'command':<24}{'median s':>10}{'times bare Python':>20}")
    for name, values in times.items():
        median = statistics.median(values)
        print(f"{name:<24}{median:>10.3f}{median / bare:>20.1f}")


if __name__ == "__main__":
    main()
