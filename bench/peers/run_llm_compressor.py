"""llm-compressor on one grid: RTN, GPTQ or AWQ with the library's defaults, weights only.

    python run_llm_compressor.py --model MODEL --text TEXT --grid int4-g128 --method gptq --out FOLDER

`--options '{"actorder": null}'` goes to the modifier. The calibration runs in the library's default pipeline.
"""

from typing import Any

import torch
from common import Run, block_linears, load, main, tokenizer_of
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from compressed_tensors.quantization.lifecycle.forward import forward_quantize
from compressed_tensors.quantization.quant_scheme import preset_name_to_scheme
from datasets import Dataset

if not torch.cuda.is_available():
    # AWQ's cache pins memory without asking whether there is an accelerator; without one that raises.
    torch.Tensor.pin_memory = lambda self, *_arguments, **_names: self

from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.quantization import QuantizationModifier
from llmcompressor.modifiers.transform.awq import AWQModifier

PRESETS = {"mxfp4": "MXFP4A16", "nvfp4": "NVFP4A16"}


def scheme(run: Run) -> QuantizationScheme:
    if run.grid in PRESETS:
        return preset_name_to_scheme(PRESETS[run.grid], ["Linear"])
    grid = run.integer
    arguments = QuantizationArgs(
        num_bits=grid.bits, type="int", symmetric=grid.symmetric, strategy="group", group_size=grid.group
    )
    return QuantizationScheme(targets=["Linear"], weights=arguments)


def recipe(run: Run) -> list[Any]:
    groups = {"config_groups": {"group_0": scheme(run)}, "ignore": ["lm_head"]}
    if run.method == "rtn":
        return [QuantizationModifier(**groups, **run.options)]
    if run.method == "gptq":
        return [GPTQModifier(**groups, **run.options)]
    if run.method == "awq":
        return [AWQModifier(**run.options), QuantizationModifier(**groups)]
    if run.method == "awq+gptq":
        return [AWQModifier(**run.options), GPTQModifier(**groups)]
    raise SystemExit(f"unknown method '{run.method}' (rtn, gptq, awq, awq+gptq)")


def dequantized(module: Any) -> torch.Tensor:
    """The values the module computes with: its weights rounded with its own scales."""
    return forward_quantize(module, module.weight, "weight", module.quantization_scheme.weights)


def quantize(run: Run) -> dict[str, torch.Tensor]:
    model = load(run.model, run.dtype)
    count, length = run.tokens.shape
    rows = [{"input_ids": row.tolist(), "attention_mask": [1] * length} for row in run.tokens]
    oneshot(
        model=model,
        tokenizer=tokenizer_of(run.model),
        dataset=Dataset.from_list(rows),
        recipe=recipe(run),
        max_seq_length=length,
        num_calibration_samples=count,
        shuffle_calibration_samples=False,
    )
    with torch.no_grad():
        rounded = {f"{name}.weight": dequantized(module) for name, module in block_linears(model).items()}
    return {**model.state_dict(), **rounded}


if __name__ == "__main__":
    main("llm-compressor", "llmcompressor", quantize)
