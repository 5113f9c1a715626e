"""Stand-ins until the store and the detection exist: a checkpoint in memory and a plain llama architecture."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file

from anyquant.core.checkpoint import TensorSpec
from anyquant.core.linear import Linear, Role, View
from anyquant.models.architecture import Architecture, Dimensions

ROLES = [
    (Role.ATTN_Q, "self_attn.q_proj", "attn_input"),
    (Role.ATTN_K, "self_attn.k_proj", "attn_input"),
    (Role.ATTN_V, "self_attn.v_proj", "attn_input"),
    (Role.ATTN_OUTPUT, "self_attn.o_proj", "attn_output_input"),
    (Role.FFN_GATE, "mlp.gate_proj", "ffn_input"),
    (Role.FFN_UP, "mlp.up_proj", "ffn_input"),
    (Role.FFN_DOWN, "mlp.down_proj", "ffn_down_input"),
]


class Stored:
    def __init__(self, folder: Path) -> None:
        self.location = str(folder)
        self.config = json.loads((folder / "config.json").read_text())
        self.metadata: dict[str, Any] = {}
        self.arrays = {}
        for path in sorted(folder.glob("*.safetensors")):
            self.arrays |= load_file(path)

    def names(self) -> list[str]:
        return list(self.arrays)

    def spec(self, name: str) -> TensorSpec:
        array = self.arrays[name]
        return TensorSpec(name, "F32", array.shape, array.nbytes)

    def read_into(self, name: str, start: int, stop: int, buffer: Any) -> None:
        array = self.arrays[name]
        buffer[:] = np.ascontiguousarray(array.reshape(-1, array.shape[-1])[start:stop]).reshape(-1).view(np.uint8)


def open_checkpoint(folder: Path) -> Stored:
    return Stored(folder)


def detect(checkpoint: Stored) -> Architecture:
    c = checkpoint.config

    def linear(name: str, role: Role, module: str, block: int | None, group: str) -> Linear:
        shape = checkpoint.spec(module + ".weight").shape
        return Linear(name, role, View(module + ".weight", 0, *shape), block, group, module)

    linears = [linear("embedding", Role.EMBEDDING, "model.embed_tokens", None, "embedding_input")]
    for i in range(c["num_hidden_layers"]):
        p = f"model.layers.{i}."
        if c["model_type"] == "phi3":
            qkv, gu = p + "self_attn.qkv_proj", p + "mlp.gate_up_proj"
            h, kv, m = c["hidden_size"], c["hidden_size"] // 4 * c["num_key_value_heads"], c["intermediate_size"]
            for role, module, start, rows, cols, g in [
                (Role.ATTN_Q, qkv, 0, h, h, "attn_input"),
                (Role.ATTN_K, qkv, h, kv, h, "attn_input"),
                (Role.ATTN_V, qkv, h + kv, kv, h, "attn_input"),
                (Role.ATTN_OUTPUT, p + "self_attn.o_proj", 0, h, h, "attn_output_input"),
                (Role.FFN_GATE, gu, 0, m, h, "ffn_input"),
                (Role.FFN_UP, gu, m, m, h, "ffn_input"),
                (Role.FFN_DOWN, p + "mlp.down_proj", 0, h, m, "ffn_down_input"),
            ]:
                v = View(module + ".weight", start, rows, cols)
                linears.append(Linear(f"blocks.{i}.{role}", role, v, i, f"blocks.{i}.{g}", module))
            continue
        for role, module, group in ROLES:
            linears.append(linear(f"blocks.{i}.{role}", role, p + module, i, f"blocks.{i}.{group}"))
    tied = c["tie_word_embeddings"]
    if not tied:
        linears.append(linear("head", Role.HEAD, "lm_head", None, "output_input"))
    d = Dimensions(0, 0, c["num_hidden_layers"], 0, 0, 0, 0, 0, 0.0, 0.0, 0)
    return Architecture(c["model_type"], "x", d, tuple(linears), (), tied, "model.layers")
