"""Mean KL(float || quantized) in nats per token of one or more model folders on the same tokens.

    python evaluate.py --model MODEL --text TEXT --results results.jsonl FOLDER ...

Plain float32 `transformers`, log-softmax in float64; windows of 512 tokens, nothing added in front. A folder's
`run.json` (written by the peer's run) is completed and appended to the results; each window's KL lies in `kl.json`.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import load, windows


def original_logits(model: Path, tokens: torch.Tensor, file: Path | None) -> torch.Tensor:
    """The float model's logits [windows, tokens, vocabulary] in float32, kept in `file` for the next evaluation."""
    if file is not None and file.exists():
        return torch.from_numpy(np.load(file, mmap_mode="c"))
    original = load(model)
    with torch.inference_mode():
        logits = torch.cat([original(window[None]).logits for window in tokens])
    if file is not None:
        np.save(file, logits.numpy())
    return logits


def window_kl(original: torch.Tensor, quantized: Any, tokens: torch.Tensor) -> list[float]:
    """The mean KL of each window's positions."""
    means = []
    with torch.inference_mode():
        for logits, window in zip(original, tokens, strict=True):
            p = torch.log_softmax(logits.double(), dim=-1)
            q = torch.log_softmax(quantized(window[None]).logits[0].double(), dim=-1)
            means.append(float((p.exp() * (p - q)).sum(dim=-1).mean()))
    return means


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folders", type=Path, nargs="+")
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--results", type=Path, default=None)
    parser.add_argument("--logits", type=Path, default=None, help="keep the float model's logits in this .npy file")
    parser.add_argument("--windows", type=int, default=40)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    tokens = windows(arguments.model, arguments.text, arguments.windows, arguments.length)
    original = original_logits(arguments.model, tokens, arguments.logits)
    for folder in arguments.folders:
        means = np.array(window_kl(original, load(folder), tokens))
        line = (
            json.loads((folder / "run.json").read_text()) if (folder / "run.json").exists() else {"folder": str(folder)}
        )
        line["kl"] = float(means.mean())
        line["kl_stderr"] = float(means.std(ddof=1) / np.sqrt(len(means)))
        line["kl_first_20"] = float(means[:20].mean())
        (folder / "kl.json").write_text(json.dumps(means.tolist()))
        print(json.dumps(line), flush=True)
        if arguments.results is not None:
            with arguments.results.open("a", encoding="utf-8") as results:
                results.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    main()
