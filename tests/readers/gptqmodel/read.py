"""Load GPTQ, AWQ and AutoRound folders as the ecosystem does, in its own environment, and write down what is in them.

    python read.py OUT FOLDER [FOLDER ...] [--loader transformers|gptqmodel] [--backend NAME] [--dtype float16]
                   [--tokens COUNT] [--seed SEED]

OUT/<name of FOLDER>.npz: "logits" (tokens, vocabulary) on random tokens below 600; "weight:<module>" (out, in) of every
quantized module, found by sending an identity matrix through it, so that it is what the kernel multiplies with;
"kernels", their classes. Or "error", where a folder is not loaded.
"""

import argparse
import os
from pathlib import Path

# gptqmodel starts as many loading threads as it likes, and stops on machines with few cores
os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# compiling takes longer than everything else here
os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")

import numpy as np
import torch
import transformers


def load(folder: Path, loader: str, backend: str | None, dtype: torch.dtype) -> torch.nn.Module:
    if loader == "gptqmodel":
        from gptqmodel import BACKEND, GPTQModel

        chosen = BACKEND(backend) if backend else BACKEND.AUTO
        return GPTQModel.load(str(folder), backend=chosen, device="cpu", dtype=dtype).model
    settings = {}
    if backend:
        stored = transformers.AutoConfig.from_pretrained(folder).quantization_config
        kinds = {"gptq": "GPTQConfig", "awq": "AwqConfig", "auto-round": "AutoRoundConfig"}
        kind = getattr(transformers, kinds[stored["quant_method"]])
        settings["quantization_config"] = kind(bits=stored["bits"], backend=backend)
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **settings)


def weight_of(module: torch.nn.Module, columns: int, dtype: torch.dtype) -> np.ndarray:
    """(out, in): what comes out for each input alone."""
    bias, module.bias = module.bias, None
    found = module(torch.eye(columns, dtype=dtype)[None])[0]
    module.bias = bias
    return found.float().numpy().T


def read(folder: Path, given: argparse.Namespace) -> dict[str, np.ndarray]:
    dtype = getattr(torch, given.dtype)
    model = load(folder, given.loader, given.backend, dtype).eval()
    quantized = {name: module for name, module in model.named_modules() if hasattr(module, "qweight")}
    found = {"kernels": np.array(sorted({type(module).__name__ for module in quantized.values()}))}
    for name, module in quantized.items():
        columns = getattr(module, "in_features", None) or module.infeatures
        found[f"weight:{name}"] = weight_of(module, columns, dtype)
    tokens = torch.from_numpy(np.random.default_rng(given.seed).integers(0, 600, (1, given.tokens)))
    found["logits"] = model(tokens).logits[0].float().numpy()
    return found


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("folders", type=Path, nargs="+")
    parser.add_argument("--loader", choices=("transformers", "gptqmodel"), default="transformers")
    parser.add_argument("--backend")
    parser.add_argument("--dtype", default="float16")
    parser.add_argument("--tokens", type=int, default=96)
    parser.add_argument("--seed", type=int, default=1)
    given = parser.parse_args()
    torch.set_num_threads(1)
    for folder in given.folders:
        try:
            with torch.inference_mode():
                found = read(folder, given)
        except Exception as error:
            found = {"error": np.array(f"{type(error).__name__}: {error}")}
        np.savez(given.out / f"{folder.name}.npz", **found)


if __name__ == "__main__":
    main()
