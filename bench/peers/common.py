"""What the runs of all peers share: the same tokens, the same linears, the same kind of output.

A run writes a folder with the dequantized model in float32 (`model.safetensors`, config, tokenizer), which
`evaluate.py` compares with the original, and prints one JSON line. The peer's own packed file is not measured here:
the grid's values are what counts, not a runtime's kernels.
"""

import argparse
import importlib.metadata
import json
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

CALIBRATION = "128x256"
"""Windows x tokens per window for calibration, unless another shape is given."""


@dataclass(frozen=True)
class IntegerGrid:
    """An integer grid with one scale (and zero point) per group of `group` neighbours in a row."""

    bits: int
    group: int
    symmetric: bool

    @property
    def bits_per_weight(self) -> float:
        """Codes, a 16-bit scale, and a zero point as wide as a code."""
        return self.bits + (16 + (0 if self.symmetric else self.bits)) / self.group


INTEGER_GRIDS = {
    f"int{bits}-g{group}{suffix}": IntegerGrid(bits, group, not suffix)
    for bits, group in ((4, 128), (3, 128), (2, 64))
    for suffix in ("", "-asym")
}
OTHER_BITS = {"mxfp4": 4.25, "nvfp4": 4.5, "nf4-g64": 4.25, "q4_k": 4.5, "q3_k": 3.4375, "q2_k": 2.625}
"""Bits per weight of the grids that are no plain integer grids (NVFP4's one scale per tensor is not counted)."""


@dataclass(frozen=True)
class Run:
    """One run of a peer: the model folder, the calibration tokens, grid, method, extra options, type."""

    model: Path
    tokens: torch.Tensor
    grid: str
    method: str
    options: dict[str, Any]
    dtype: torch.dtype = torch.float32

    @property
    def integer(self) -> IntegerGrid:
        """The integer grid; a grid of another kind ends the run."""
        if self.grid not in INTEGER_GRIDS:
            raise SystemExit(f"this peer has no grid '{self.grid}' here")
        return INTEGER_GRIDS[self.grid]


def tokenizer_of(model: Path) -> Any:
    """The model's tokenizer, read from `tokenizer.json` without remote code."""
    return PreTrainedTokenizerFast.from_pretrained(model)


def windows(model: Path, text: Path, count: int, length: int) -> torch.Tensor:
    """The first `count` windows of `length` tokens [count, length] of the file as one stream, nothing added."""
    ids = tokenizer_of(model)(text.read_text(encoding="utf-8"), add_special_tokens=False)["input_ids"]
    if len(ids) < count * length:
        raise SystemExit(f"{text} has {len(ids)} tokens, {count * length} are needed")
    return torch.tensor(ids[: count * length], dtype=torch.long).reshape(count, length)


def load(model: Path, dtype: torch.dtype = torch.float32) -> Any:
    """The float model, ready for inference."""
    return AutoModelForCausalLM.from_pretrained(model, dtype=dtype).eval()


def block_linears(model: Any) -> dict[str, torch.nn.Module]:
    """The projections inside the decoder blocks by name, without the head."""
    kinds = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    return {name: module for name, module in model.named_modules() if name.rpartition(".")[2] in kinds}


def publish(source: Path, state: dict[str, torch.Tensor], out: Path) -> None:
    """Write a plain float32 model folder from the weights of `state`, which must have the names of the source's."""
    expected = set(load(source).state_dict())
    if missing := expected - set(state):
        raise SystemExit(f"the result lacks {len(missing)} tensors, {min(missing)} for one")
    out.mkdir(parents=True, exist_ok=True)
    for file in (*source.glob("tokenizer*"), *source.glob("generation_config.json")):
        shutil.copyfile(file, out / file.name)
    config = json.loads((source / "config.json").read_text())
    (out / "config.json").write_text(json.dumps(config | {"dtype": "float32"}, indent=2))
    kept = {name: state[name].detach().to(torch.float32).contiguous().clone() for name in sorted(expected)}
    save_file(kept, out / "model.safetensors", metadata={"format": "pt"})


def distinct_values(state: dict[str, torch.Tensor], run: Run) -> int:
    """The most distinct values in any group (a check that the grid is what it says); integer grids only."""
    most = 0
    for name in (name for name in state if name.endswith("down_proj.weight")):
        groups = state[name].detach().float().numpy().reshape(-1, run.integer.group)
        # Float noise of a dequantization is far below a step: a millionth of the group's range.
        step = 1e-6 * np.maximum(groups.max(axis=1) - groups.min(axis=1), 1e-30)
        counts = (np.diff(np.sort(groups, axis=1), axis=1) > step[:, None]).sum(axis=1) + 1
        most = max(most, int(counts.max()))
    return most


def main(peer: str, package: str, quantize: Callable[[Run], dict[str, torch.Tensor]]) -> None:
    """Read the command line, run `quantize` (which returns a plain state dict), publish it, print the JSON line."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--text", type=Path, required=True, help="calibration text")
    parser.add_argument("--grid", required=True, choices=[*INTEGER_GRIDS, *OTHER_BITS])
    parser.add_argument("--method", required=True)
    parser.add_argument("--options", type=json.loads, default={}, help="a JSON object of the peer's own options")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--shape", default=CALIBRATION, help="windows x tokens of calibration")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"), help="the model is loaded in")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    tokens = windows(arguments.model, arguments.text, *map(int, arguments.shape.split("x")))
    dtype = getattr(torch, arguments.dtype)
    run = Run(arguments.model, tokens, arguments.grid, arguments.method, arguments.options, dtype)
    start, start_cpu = time.perf_counter(), time.process_time()
    state = quantize(run)
    seconds, cpu = time.perf_counter() - start, time.process_time() - start_cpu
    publish(arguments.model, state, arguments.out)
    integer = INTEGER_GRIDS.get(run.grid)
    line = {
        "peer": peer,
        "version": importlib.metadata.version(package),
        "method": run.method,
        "options": run.options,
        "dtype": arguments.dtype,
        "grid": run.grid,
        "bits_per_weight": integer.bits_per_weight if integer else OTHER_BITS[run.grid],
        "seconds": round(seconds, 1),
        "cpu_seconds": round(cpu, 1),
        "threads": arguments.threads,
        "distinct_values": distinct_values(state, run) if integer else None,
    }
    (arguments.out / "run.json").write_text(json.dumps(line))
    print(json.dumps(line))
