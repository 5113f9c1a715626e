"""GPTQModel on one integer grid with its defaults (GPTQ, group-aware order).

    python run_gptqmodel.py --model MODEL --text TEXT --grid int4-g128 --method gptq --out FOLDER

The checkpoint it writes is read back by the library's own plain-torch kernel, which dequantizes it. On two
cores the library ends with an error unless GPTQMODEL_CPU_WORKERS=2 is set.
"""

import tempfile

import torch
from common import Run, load, main
from gptqmodel import BACKEND, GPTQModel, QuantizeConfig


def quantize(run: Run) -> dict[str, torch.Tensor]:
    if run.method != "gptq":
        raise SystemExit(f"unknown method '{run.method}' (gptq)")
    grid = run.integer
    config = QuantizeConfig(bits=grid.bits, group_size=grid.group, sym=grid.symmetric, **run.options)
    model = GPTQModel.load(str(run.model), config, device="cpu")
    rows = [{"input_ids": row.tolist(), "attention_mask": [1] * len(row)} for row in run.tokens]
    model.quantize(rows, batch_size=1)
    state = dict(load(run.model).state_dict())
    with tempfile.TemporaryDirectory() as folder:
        model.save(folder)
        packed = GPTQModel.load(folder, device="cpu", backend=BACKEND.TORCH)
        for name, module in packed.model.named_modules():
            if hasattr(module, "dequantize_weight"):
                state[f"{name}.weight"] = module.dequantize_weight().T.float()
    return state


if __name__ == "__main__":
    main("gptqmodel", "gptqmodel", quantize)
