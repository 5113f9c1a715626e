"""NNCF's weight compression on one grid, over OpenVINO: plain, AWQ, scale estimation, GPTQ.

    python run_nncf.py --model MODEL --text TEXT --grid int4-g128-asym --method gptq --out FOLDER

`--method` is `rtn` or a chain of `awq`, `scale` (estimation), `gptq`, `lora`, such as `awq+scale`. The weights are read
out of the compressed OpenVINO model; a factor that AWQ left on a linear's input is folded into its columns. The
folded model must answer like the compressed one, else the run ends.
"""

from typing import Any

import nncf
import numpy as np
import openvino as ov
import torch
from common import Run, block_linears, load, main
from openvino import opset13 as opset

MODES = {
    "int4-g128": "INT4_SYM",
    "int4-g128-asym": "INT4_ASYM",
    "int3-g128": "INT3_SYM",
    "int2-g64": "INT2_SYM",
    "mxfp4": "MXFP4",
    "nvfp4": "NVFP4",
    "nf4-g64": "NF4",
}
GROUPS = {"mxfp4": 32, "nvfp4": 16, "nf4-g64": 64}
SWITCHES = {"awq": "awq", "scale": "scale_estimation", "gptq": "gptq", "lora": "lora_correction"}
PRECISE = {"INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0"}
"""Without these the CPU plugin computes in bfloat16 and rounds activations to 8 bits."""
TOLERANCE = 1e-2
"""Largest allowed difference of the logits; the values are the same, the order of float32 sums is not."""


class Logits(torch.nn.Module):
    """The decoder as a function from ids to logits."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        # A ready-made mask keeps the search for packed sequences out of the trace; OpenVINO cannot convert it.
        length = input_ids.shape[1]
        mask = torch.full((length, length), torch.finfo(torch.float32).min).triu(1)[None, None]
        logits: torch.Tensor = self.model(input_ids, attention_mask=mask, use_cache=False).logits
        return logits


def value(output: Any) -> np.ndarray:
    """The constant that an output of the graph folds to."""
    compiled = ov.compile_model(ov.Model([opset.result(output)], []), "CPU", PRECISE)
    return np.array(compiled([])[0])


def producer(node: Any, place: int) -> Any:
    """The node that feeds an input, conversions skipped."""
    source = node.input_value(place).get_node()
    while source.get_type_name() in ("Convert", "Reshape"):
        source = source.input_value(0).get_node()
    return source


def input_factor(matmul: Any) -> np.ndarray | None:
    """The factor per input channel that AWQ put in front of a linear."""
    source = producer(matmul, 0)
    if source.get_type_name() == "Multiply" and "awq_mul" in source.get_friendly_name():
        return value(source.input_value(1)).reshape(-1)
    return None


def linear_weights(graph: Any, names: list[str]) -> dict[str, np.ndarray]:
    """The dequantized weights [out, in] of the linears, by module name."""
    weights = {}
    for node in graph.get_ordered_ops():
        name = node.get_friendly_name().removeprefix("__module.model.").partition("/")[0]
        if node.get_type_name() != "MatMul" or name not in names:
            continue
        weight = value(node.input_value(1)).astype(np.float32)
        weight = weight if node.get_attributes()["transpose_b"] else weight.T
        factor = input_factor(node)
        weights[name] = weight if factor is None else weight * factor
    return weights


def quantize(run: Run) -> dict[str, torch.Tensor]:
    if run.grid not in MODES:
        raise SystemExit(f"NNCF has no grid '{run.grid}'")
    model = load(run.model, run.dtype)
    graph = ov.convert_model(Logits(model), example_input=run.tokens[:1], input=[("input_ids", [1, -1], ov.Type.i64)])
    switches = {} if run.method == "rtn" else {SWITCHES[part]: True for part in run.method.split("+")}
    dataset = nncf.Dataset([{"input_ids": row[None].numpy()} for row in run.tokens]) if switches else None
    graph = nncf.compress_weights(
        graph,
        mode=nncf.CompressWeightsMode[MODES[run.grid]],
        group_size=GROUPS.get(run.grid) or run.integer.group,
        ignored_scope=nncf.IgnoredScope(patterns=[".*lm_head.*", ".*embed_tokens.*"]),
        all_layers=True,
        dataset=dataset,
        **switches,
        **run.options,
    )
    linears = block_linears(model)
    weights = linear_weights(graph, list(linears))
    if missing := set(linears) - set(weights):
        raise SystemExit(f"{len(missing)} linears were not found in the graph, {min(missing)} for one")
    with torch.no_grad():
        for name, linear in linears.items():
            linear.weight.copy_(torch.from_numpy(weights[name]))
        answer = model(run.tokens[:1]).logits.numpy()
    difference = np.abs(ov.compile_model(graph, "CPU", PRECISE)(run.tokens[:1].numpy())[0] - answer).max()
    if difference > TOLERANCE:
        raise SystemExit(f"the extracted weights do not answer like NNCF's model: logits differ by {difference:.3g}")
    return dict(model.state_dict())


if __name__ == "__main__":
    main("nncf", "nncf", quantize)
