"""Let GPTQModel and AutoRound quantize a tiny model themselves, in their own environment.

    python quantize.py SOURCE OUT

Folders under OUT, one for each way that they store: read.py tells what is in them.
"""

import os
import shutil
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")

import numpy as np
import torch
import transformers

# name -> (export format, settings of the scheme, other bits for single modules)
AUTO_ROUND: dict[str, tuple[str, dict[str, Any], dict[str, dict[str, Any]]]] = {
    "auto-round-sym": ("auto_round", {"bits": 4, "group_size": 64, "sym": True}, {}),
    "auto-round-asym": ("auto_round", {"bits": 4, "group_size": 32, "sym": False}, {}),
    "auto-round-three": ("auto_round", {"bits": 3, "group_size": 64, "sym": False}, {}),
    "auto-round-mixed": (
        "auto_round",
        {"bits": 4, "group_size": 64, "sym": True},
        {
            "model.layers.0.mlp.down_proj": {"bits": 8, "group_size": 32},
            "model.layers.1.self_attn.o_proj": {"bits": 16},
        },
    ),
    "auto-round-gptq": ("auto_gptq", {"bits": 4, "group_size": 64, "sym": True}, {}),
    "auto-round-awq": ("auto_awq", {"bits": 4, "group_size": 64, "sym": False}, {}),
    "auto-round-awq-sym": ("auto_awq", {"bits": 4, "group_size": 64, "sym": True}, {}),
}
GPTQMODEL: dict[str, dict[str, Any]] = {
    "gptqmodel-sym": {"bits": 4, "group_size": 32, "sym": True, "desc_act": False},
    "gptqmodel-order": {"bits": 4, "group_size": 64, "sym": True, "desc_act": True, "act_group_aware": False},
    "gptqmodel-asym": {"bits": 4, "group_size": 32, "sym": False, "desc_act": False},
    "gptqmodel-v2": {
        "bits": 8,
        "group_size": -1,
        "sym": False,
        "desc_act": False,
        "act_group_aware": False,
        "format": "gptq_v2",
    },
    "gptqmodel-dynamic": {
        "bits": 4,
        "group_size": 64,
        "sym": True,
        "desc_act": False,
        "dynamic": {r"+:.*\.0\.mlp\.down_proj": {"bits": 8, "group_size": 32}, r"-:.*\.1\.self_attn\.o_proj": {}},
    },
}


def auto_round(source: Path, out: Path, form: str, scheme: dict[str, Any], layers: dict[str, dict[str, Any]]) -> None:
    from auto_round import AutoRound

    model = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.float16)
    tokenizer = transformers.AutoTokenizer.from_pretrained(source)
    settings = {"iters": 0, "disable_opt_rtn": True, "layer_config": layers or None}
    AutoRound(model, tokenizer, **scheme, **settings).quantize_and_save(str(out / "made"), format=form)
    found = next(path.parent for path in (out / "made").rglob("config.json"))
    found.rename(out / "found")


def gptqmodel(source: Path, out: Path, settings: dict[str, Any]) -> None:
    from gptqmodel import BACKEND, GPTQModel, QuantizeConfig

    model = GPTQModel.load(str(source), QuantizeConfig(**settings), device="cpu")
    random = np.random.default_rng(3)
    texts = [{"input_ids": one, "attention_mask": [1] * 64} for one in random.integers(0, 600, (16, 64)).tolist()]
    model.quantize(texts, batch_size=1, backend=BACKEND.GPTQ_TORCH)
    model.save(str(out / "found"))


def main() -> None:
    source, out = Path(sys.argv[1]), Path(sys.argv[2])
    torch.set_num_threads(1)
    for name in (*AUTO_ROUND, *GPTQMODEL):
        work = out / f"{name}.work"
        work.mkdir(parents=True)
        try:
            if name in AUTO_ROUND:
                auto_round(source, work, *AUTO_ROUND[name])
            else:
                gptqmodel(source, work, GPTQMODEL[name])
            (work / "found").rename(out / name)
        except Exception as error:
            (out / f"{name}.error").write_text(f"{type(error).__name__}: {error}")
        shutil.rmtree(work)


if __name__ == "__main__":
    main()
