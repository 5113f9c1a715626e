"""AutoRound on one grid: 200 iterations (the default), another number by `--options`, or its own RTN.

python run_auto_round.py --model MODEL --text TEXT --grid int4-g128 --method auto-round --out FOLDER
"""

from typing import Any

import torch
from auto_round import AutoRound
from common import Run, block_linears, load, main, tokenizer_of

SCHEMES: dict[str, dict[str, Any]] = {
    "mxfp4": {"bits": 4, "group_size": 32, "data_type": "mx_fp", "sym": True},
    "nvfp4": {"bits": 4, "group_size": 16, "data_type": "nv_fp", "sym": True},
    # The values of its schemes gguf:q4_k and so on. Named GGUF schemes are mixtures; these hold for every linear.
    "q4_k": {
        "bits": 4,
        "group_size": 32,
        "data_type": "int_asym_dq",
        "sym": False,
        "super_bits": 6,
        "super_group_size": 8,
    },
    "q3_k": {
        "bits": 3,
        "group_size": 16,
        "data_type": "int_sym_dq",
        "sym": True,
        "super_bits": 6,
        "super_group_size": 16,
    },
    "q2_k": {
        "bits": 2,
        "group_size": 16,
        "data_type": "int_asym_dq",
        "sym": False,
        "super_bits": 4,
        "super_group_size": 16,
    },
}
METHODS = {"auto-round": {}, "rtn": {"iters": 0}}


def scheme(run: Run) -> Any:
    if run.grid in SCHEMES:
        return {**SCHEMES[run.grid], "act_bits": 16}
    grid = run.integer
    return {"bits": grid.bits, "group_size": grid.group, "sym": grid.symmetric, "data_type": "int", "act_bits": 16}


def quantize(run: Run) -> dict[str, torch.Tensor]:
    count, length = run.tokens.shape
    if run.method not in METHODS:
        raise SystemExit(f"unknown method '{run.method}' ({', '.join(METHODS)})")
    model = load(run.model, run.dtype)
    # The K grids are mixtures by default, and round the head; a scheme given layer by layer holds as it is.
    layers = {name: scheme(run) for name in block_linears(model)} if run.grid.endswith("_k") else None
    rounding = AutoRound(
        model,
        tokenizer=tokenizer_of(run.model),
        scheme=scheme(run),
        layer_config=layers,
        dataset=[{"input_ids": row[None]} for row in run.tokens],
        nsamples=count,
        seqlen=length,
        device_map="cpu",
        **METHODS[run.method],
        **run.options,
    )
    rounded, _ = rounding.quantize()
    linears = block_linears(rounded)
    return {**load(run.model).state_dict(), **{f"{name}.weight": linear.weight for name, linear in linears.items()}}


if __name__ == "__main__":
    main("auto-round", "auto-round", quantize)
