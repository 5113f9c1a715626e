"""Write a Llama-shaped checkpoint of random bfloat16 weights, without holding it in memory."""

import json
import shutil
from pathlib import Path

import numpy as np

from anyquant.core.dtypes import float32_to_bfloat16

VOCABULARY = 2048  # of the demo's tokenizer, so that the folder is complete


def shapes(hidden: int, intermediate: int, blocks: int, vocabulary: int) -> dict[str, tuple[int, ...]]:
    """Tensor names and shapes of a Llama with an eighth of the heads for keys and values."""
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocabulary, hidden)}
    narrow = hidden // 4
    for index in range(blocks):
        prefix = f"model.layers.{index}"
        found |= {
            f"{prefix}.input_layernorm.weight": (hidden,),
            f"{prefix}.self_attn.q_proj.weight": (hidden, hidden),
            f"{prefix}.self_attn.k_proj.weight": (narrow, hidden),
            f"{prefix}.self_attn.v_proj.weight": (narrow, hidden),
            f"{prefix}.self_attn.o_proj.weight": (hidden, hidden),
            f"{prefix}.post_attention_layernorm.weight": (hidden,),
            f"{prefix}.mlp.gate_proj.weight": (intermediate, hidden),
            f"{prefix}.mlp.up_proj.weight": (intermediate, hidden),
            f"{prefix}.mlp.down_proj.weight": (hidden, intermediate),
        }
    return found | {"model.norm.weight": (hidden,), "lm_head.weight": (vocabulary, hidden)}


def write_checkpoint(folder: Path, hidden: int, intermediate: int, blocks: int, vocabulary: int = VOCABULARY) -> int:
    """Returns the number of parameters. Weights are normal with standard deviation 0.02, norms 1."""
    from anyquant.api import model_path

    folder.mkdir(parents=True)
    tensors = shapes(hidden, intermediate, blocks, vocabulary)
    header, offset = {}, 0
    for name, shape in tensors.items():
        size = 2 * int(np.prod(shape))
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    random = np.random.default_rng(0)
    noise = float32_to_bfloat16((random.standard_normal(1 << 22) * 0.02).astype(np.float32))
    ones = float32_to_bfloat16(np.ones(1 << 16, np.float32))
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for shape in tensors.values():
            left, source = int(np.prod(shape)), noise if len(shape) > 1 else ones
            while left:
                start = int(random.integers(0, 1024)) if len(shape) > 1 else 0
                piece = source[start : start + left]
                file.write(piece.data)
                left -= len(piece)
    config = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": blocks,
        "num_attention_heads": hidden // 64,
        "num_key_value_heads": hidden // 256,
        "head_dim": 64,
        "vocab_size": vocabulary,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "bos_token_id": 0,
        "eos_token_id": 1,
    }
    (folder / "config.json").write_text(json.dumps(config))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(model_path("demo") / name, folder / name)
    return sum(int(np.prod(shape)) for shape in tensors.values())
