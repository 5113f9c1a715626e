"""Record what AMD's Quark itself writes: golden files for tests/formats/test_quark.py.

    python tools/record_quark.py

Needs an environment of its own with torch, transformers, safetensors and amd-quark 0.13. A small Llama is quantized on
the CPU by each scheme and exported. Writes tests/golden/quark/NAME.json (its quantization_config, and the type and
shape of every tensor) and NAME.safetensors (the tensors of one module, and under "decoded" the first rows of its weight
as Quark's "fake_quantized" export has them).
"""

import json
import tempfile
from pathlib import Path
from typing import Any

import quark.torch.quantization.config.config as configs
import torch
import transformers
from quark.torch import ModelQuantizer, export_safetensors
from safetensors.torch import load_file, save_file

GOLDEN = Path(__file__).parent.parent / "tests" / "golden" / "quark"
MODULE = "model.layers.0.mlp.down_proj"
ROWS = 4


def fp8(reach: str, dynamic: bool, axis: int = 0) -> Any:
    if reach == "tensor":
        return configs.FP8E4M3PerTensorSpec(observer_method="min_max", is_dynamic=dynamic)
    return configs.FP8E4M3PerChannelSpec(is_dynamic=dynamic, ch_axis=axis)


def int8(dynamic: bool, axis: int) -> Any:
    return configs.Int8PerChannelSpec(
        symmetric=True, scale_type="float", round_method="half_even", ch_axis=axis, is_dynamic=dynamic
    )


# weight and input
SCHEMES = {
    "fp8": (fp8("tensor", False), fp8("channel", True, 1)),
    "fp8-static": (fp8("tensor", False), fp8("tensor", False)),
    "fp8-channel": (fp8("channel", False), fp8("channel", True, 1)),
    "int8": (int8(False, 0), int8(True, 1)),
    "mxfp4": (configs.OCP_MXFP4Spec(ch_axis=-1, is_dynamic=False), None),
    "mxfp4-both": (
        configs.OCP_MXFP4Spec(ch_axis=-1, is_dynamic=False),
        configs.OCP_MXFP4Spec(ch_axis=-1, is_dynamic=True),
    ),
    "mxfp6_e2m3": (configs.OCP_MXFP6E2M3Spec(ch_axis=-1, is_dynamic=False), None),
    "mxfp6_e3m2": (
        configs.OCP_MXFP6E3M2Spec(ch_axis=-1, is_dynamic=False),
        configs.OCP_MXFP6E3M2Spec(ch_axis=-1, is_dynamic=True),
    ),
}


def main() -> None:
    GOLDEN.mkdir(parents=True, exist_ok=True)
    for name, (weight, inputs) in SCHEMES.items():
        record(name, weight.to_quantization_spec(), None if inputs is None else inputs.to_quantization_spec())


def record(name: str, weight: Any, inputs: Any) -> None:
    settings, tensors = exported(weight, inputs, "real_quantized")
    _, simulated = exported(weight, inputs, "fake_quantized")
    kept = {key.removeprefix(MODULE + "."): one for key, one in tensors.items() if key.startswith(MODULE + ".")}
    decoded = simulated[f"{MODULE}.weight"][:ROWS].contiguous()
    save_file({**kept, "decoded": decoded}, GOLDEN / f"{name}.safetensors")
    header = {key: [str(one.dtype).removeprefix("torch."), list(one.shape)] for key, one in sorted(tensors.items())}
    facts = {"quantization_config": settings, "tensors": header}
    (GOLDEN / f"{name}.json").write_text(json.dumps(facts, indent=1, sort_keys=True) + "\n", encoding="utf-8")


def exported(weight: Any, inputs: Any, weight_format: str) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
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
    model = transformers.LlamaForCausalLM(config).to(torch.float32).eval()
    layer = configs.QLayerConfig(weight=weight, input_tensors=inputs)
    quantizer = ModelQuantizer(configs.QConfig(global_quant_config=layer, exclude=["lm_head"]))
    generator = torch.Generator().manual_seed(1)
    batches = [torch.randint(0, 64, (1, 16), generator=generator) for _ in range(4)]
    model = quantizer.freeze(quantizer.quantize_model(model, batches))
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        export_safetensors(model, folder, weight_format=weight_format)
        settings = json.loads((Path(folder) / "config.json").read_text()).get("quantization_config", {})
        return settings, load_file(Path(folder) / "model.safetensors")


if __name__ == "__main__":
    main()
