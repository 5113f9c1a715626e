"""Record what NVIDIA's ModelOpt itself writes: golden files for tests/formats/test_modelopt.py.

    python tools/record_modelopt.py

Needs an environment of its own with torch, transformers, safetensors and nvidia-modelopt 0.47.0. A small Llama is
quantized on the CPU by each scheme and exported as a "unified checkpoint". Writes tests/golden/modelopt/NAME.json (both
configs and the type and shape of every tensor) and NAME.safetensors (the tensors of one module, and under "decoded"
the first rows of the weight as ModelOpt's own code computes it from them), and mixed.json, the configs of a mixture.
"""

import copy
import json
import tempfile
from pathlib import Path
from typing import Any

import modelopt.torch.quantization as mtq
import torch
import transformers
from modelopt.torch.export import export_hf_checkpoint
from modelopt.torch.export.convert_hf_config import convert_hf_quant_config_format
from modelopt.torch.export.quant_utils import process_layer_quant_config
from modelopt.torch.quantization.qtensor.mxfp8_tensor import MXFP8QTensor
from modelopt.torch.quantization.qtensor.nvfp4_tensor import NVFP4QTensor
from safetensors.torch import load_file, save_file

GOLDEN = Path(__file__).parent.parent / "tests" / "golden" / "modelopt"
SCHEMES = {
    "fp8": "FP8_DEFAULT_CFG",
    "fp8-channel": "FP8_PER_CHANNEL_PER_TOKEN_CFG",
    "fp8-block": "FP8_2D_BLOCKWISE_WEIGHT_ONLY_CFG",
    "nvfp4": "NVFP4_DEFAULT_CFG",
    "w4a16-nvfp4": "W4A16_NVFP4_CFG",
    "mxfp8": "MXFP8_DEFAULT_CFG",
    "int4": "INT4_BLOCKWISE_WEIGHT_ONLY_CFG",
    "int4-awq": "INT4_AWQ_CFG",
    "int8": "INT8_WEIGHT_ONLY_CFG",
    "int8-smooth": "INT8_SMOOTHQUANT_CFG",
}
MODULE = "model.layers.0.mlp.down_proj"
ROWS = 4
# the mixture that the test writes, in ModelOpt's own words for formats
MIXED = {"q_proj": ("w4a16_nvfp4", 16), "o_proj": ("int4_awq", 128), "down_proj": ("fp8_pc_pt", 0)}


def main() -> None:
    GOLDEN.mkdir(parents=True, exist_ok=True)
    for name, config in SCHEMES.items():
        record(name, config)
    layers: dict[str, Any] = {}
    for layer, (kind, group) in MIXED.items():
        layers |= {f"{layer}.quantization": kind, f"{layer}.awq_block_size": group}
    mixed = {"producer": producer(), "quantization": process_layer_quant_config(layers)}
    write("mixed", {"hf_quant_config": mixed, "quantization_config": convert_hf_quant_config_format(mixed)})


def producer() -> dict[str, str]:
    return {"name": "modelopt", "version": "0.47.0"}


def record(name: str, config: str) -> None:
    model = small_model()
    model = mtq.quantize(model, copy.deepcopy(getattr(mtq, config)), run)
    module = model.get_submodule(MODULE)
    simulated = None
    if name not in ("nvfp4", "w4a16-nvfp4", "mxfp8"):  # whose simulation needs a GPU
        simulated = module.weight_quantizer(module.weight).detach()
    with tempfile.TemporaryDirectory() as folder:
        export_hf_checkpoint(model, dtype=torch.float32, export_dir=folder)
        tensors = load_file(Path(folder) / "model.safetensors")
        settings = json.loads((Path(folder) / "config.json").read_text())["quantization_config"]
        legacy = json.loads((Path(folder) / "hf_quant_config.json").read_text())
    kept = {key.removeprefix(MODULE + "."): one for key, one in tensors.items() if key.startswith(MODULE + ".")}
    decoded = decode(name, kept) if simulated is None else simulated
    save_file({**kept, "decoded": decoded[:ROWS].contiguous()}, GOLDEN / f"{name}.safetensors")
    header = {key: [str(one.dtype).removeprefix("torch."), list(one.shape)] for key, one in sorted(tensors.items())}
    write(name, {"hf_quant_config": legacy, "quantization_config": settings, "tensors": header})


def small_model() -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=64,
        max_position_embeddings=64,
        tie_word_embeddings=False,
        architectures=["LlamaForCausalLM"],
    )
    return transformers.LlamaForCausalLM(config).to(torch.float32).eval()


def run(model: Any) -> None:
    generator = torch.Generator().manual_seed(1)
    for _ in range(4):
        model(torch.randint(0, 64, (2, 16), generator=generator))


def decode(name: str, tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    """By ModelOpt's own tensor classes."""
    weight = tensors["weight"]
    if name == "mxfp8":
        return MXFP8QTensor(weight.shape, torch.float32, weight).dequantize(scale=tensors["weight_scale"])
    shape = torch.Size((weight.shape[0], weight.shape[1] * 2))
    scales = {"scale": tensors["weight_scale"], "double_scale": tensors["weight_scale_2"]}
    return NVFP4QTensor(shape, torch.float32, weight).dequantize(**scales, block_sizes={-1: 16})


def write(name: str, facts: dict[str, Any]) -> None:
    (GOLDEN / f"{name}.json").write_text(json.dumps(facts, indent=1, sort_keys=True) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
