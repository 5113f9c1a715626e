"""Whole runs of chains on tiny models: what the report says is what the written files do, by plain `transformers`."""

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import safetensors.numpy
import safetensors.torch
import torch
import transformers

from anyquant import api
from anyquant.calibrate.text import Document, digest
from anyquant.grids import grid as find_grid
from anyquant.models.detect import detect
from anyquant.pipeline.recipe import Calibration, Recipe
from anyquant.pipeline.report import Report
from anyquant.pipeline.texts import load_splits, source_tokenizer
from anyquant.store.open import open_checkpoint
from anyquant.store.state import StateReader
from support.checkpoints import make_checkpoint

Values = Mapping[str, npt.NDArray[Any]]

MODULES = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_norm": "input_layernorm",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "router": "mlp.gate",
}
OUTSIDE = {"embedding": "model.embed_tokens", "head": "lm_head", "output_norm": "model.norm"}
MIXTRAL = {"ffn_gate": "w1", "ffn_down": "w2", "ffn_up": "w3"}


@dataclass(frozen=True)
class Run:
    """A chain on a family of models; `options` are those of the recipe, `pruned` the share of weights that are 0."""

    chain: str
    grid: str = "int4-g32"
    family: str = "llama"
    options: Mapping[str, Any] = field(default_factory=dict)
    activations: str | None = None
    pruned: float = 0
    named: str = ""  # how the report says the chain, where it adds what follows by itself

    @property
    def name(self) -> str:
        return f"{self.family}-{self.chain.replace(' ', '')}-{self.grid}-{self.activations or 'float'}"


RUNS = (
    Run("fold_norms -> gptq"),
    Run("rotate -> gptq"),
    Run("rotate", "f32"),
    Run("rotate -> gptq", family="llama-tied"),
    Run("awq -> rtn"),
    Run("awq -> rtn", "int4-g64", "llama-bf16"),  # norms that leave the source's type
    Run("awq -> gptq", "int3-g32-asym"),
    Run("permute -> rtn", "nvfp4"),
    Run("smoothquant", "int8-channel", activations="int8-channel", named="smoothquant -> rtn"),
    Run("smoothquant", "int8-channel", activations="int8-tensor:static", named="smoothquant -> rtn"),
    Run("wanda -> gptq -> eora", options={"rank": 8}),
    Run("sparsegpt", pruned=0.5, named="sparsegpt -> gptq"),
    Run("sparsegpt", "f32", pruned=0.5, options={"pattern": "2:4"}, named="sparsegpt -> gptq"),
    Run("magnitude", "mxfp4", pruned=0.25, options={"sparsity": 0.25}, named="magnitude -> rtn"),
    Run("lorc", "int3-g32", options={"rank": 8}, named="rtn -> lorc"),
    Run("hqq", "nf4-g64"),
    Run("autoround", "int3-g64", options={"iterations": 4}),
    Run("codebook", "codebook3"),
    Run("rotate -> awq -> gptq", "fp8_e4m3-block"),
    Run("gptq", family="qwen3_moe"),
    Run("gptq", "int3-g64-asym", family="mixtral"),
)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sentences of few words, long enough for three splits."""
    random = np.random.default_rng(0)
    sentence = "the river rises in hills above a town and runs for ninety miles before it reaches the grey sea"
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(" ".join(random.choice(sentence.split(), 12000)), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, int], Path]:
    base = tmp_path_factory.mktemp("models")

    def get(name: str, hidden: int = 64) -> Path:
        family, _, variant = name.partition("-")
        folder = base / f"{name}{hidden}"
        if not folder.exists():
            config = {"intermediate_size": 2 * hidden}
            config |= {"moe_intermediate_size": hidden} if family == "qwen3_moe" else {}
            dtype = "BF16" if variant == "bf16" else "F32"
            make_checkpoint(folder, family, tied=variant == "tied", dtype=dtype, hidden=hidden, config=config)
        return folder

    return get


def make(source: Path, text: Path, out: Path, run: Run, target: str | None = None) -> Report:
    calibration = Calibration(text=str(text), tokens=1024, context=64)
    recipe = Recipe(
        grid=run.grid,
        algorithm=run.chain,
        options=run.options,
        activations=run.activations,
        calibration=calibration,
    )
    return api.make(source, out=out, recipe=recipe, target=target, threads=1)


@pytest.mark.parametrize("run", RUNS, ids=lambda run: run.name)
def test_the_report_says_what_the_files_do(run: Run, model: Any, text: Path, tmp_path: Path) -> None:
    source, out = model(run.family), tmp_path / "out"
    report = make(source, text, out, run)
    assert report.status == "measured" and report.loss is not None
    assert (report.chain, report.nbytes) == (run.named or run.chain, tree_bytes(out))
    last = (run.named or run.chain).split(" -> ")
    for line in report.ledger.lines:
        if line.name.startswith("blocks.") and line.role != "router" and line.algorithm != "carried":
            assert line.applied == run.grid
            assert last[-len(line.algorithm.split(" -> ")) :] == line.algorithm.split(" -> ") or run.grid == "f32"
    report.ledger.balance(payload(source), payload(out))
    assert (tmp_path / "out" / "report.json").exists() and not list(tmp_path.glob(".*"))

    values = decoded(out, run.family)
    with safetensors.safe_open(source / "model.safetensors", "pt") as file:
        assert values.keys() >= set(file.keys())
    zeros = np.mean([np.mean(values[name] == 0) for name in values if "_proj" in name])
    if run.pruned:
        assert zeros == pytest.approx(run.pruned, abs=0.01) or (run.grid != "f32" and zeros > run.pruned)
    documents = certified(source, text, report)
    rounding = None
    if run.activations is not None:
        rounding = rounded_inputs(out, run.activations)
    found = mean_kl(load(source), load(written(tmp_path / "hf", out, values), rounding), documents)
    assert np.isfinite(found)
    # a rounded activation that lies on a tie may fall to either side
    assert report.loss.mean_kl[0] == pytest.approx(found, rel=2e-3 if rounding is None else 2e-2, abs=2e-6)
    if run.grid == "f32" and not run.pruned:
        assert found < 1e-5
    else:
        assert 1e-5 < found < 3


@pytest.mark.parametrize("run", [Run("rotate", "q8_0", "llama-tied"), Run("rotate -> gptq", "q4_0", "llama-tied")])
def test_a_rotated_model_whose_head_was_tied_runs_in_llama_cpp(
    run: Run, model: Any, text: Path, tmp_path: Path
) -> None:
    source, out = model(run.family), tmp_path / "out"
    report = make(source, text, out, run, "llama.cpp")
    assert report.status == "measured" and report.loss is not None and report.conversion is not None
    assert report.conversion.tokens_equal and report.conversion.mean_kl <= report.conversion.limit
    assert any(line.name == "head" and line.source_dtype == "(untied)" for line in report.ledger.lines)
    assert any(sentence.startswith("Transforms: logits before and after agree") for sentence in report.sentences)
    documents = certified(source, text, report)
    converted = transformers.AutoModelForCausalLM.from_pretrained(out, gguf_file="model.gguf", dtype=torch.float32)
    found = mean_kl(load(source), converted, documents)
    # llama.cpp rounds activations to eight bits where weights are quantized
    assert report.conversion.arithmetic is not None
    assert report.loss.mean_kl[0] == pytest.approx(found, rel=0.1, abs=2 * report.conversion.arithmetic)
    assert report.conversion.arithmetic < 0.5 * found


def test_a_chain_for_transformers_is_what_the_library_loads(model: Any, text: Path, tmp_path: Path) -> None:
    run = Run("rotate -> awq -> gptq", "int4-g64", "llama-tied")
    source, out = model(run.family), tmp_path / "out"
    report = make(source, text, out, run, "transformers")
    assert report.status == "measured" and report.loss is not None and report.chain == run.chain
    converted = transformers.AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    found = mean_kl(load(source), converted, certified(source, text, report))
    assert report.loss.mean_kl[0] == pytest.approx(found, rel=2e-3)


def certified(source: Path, text: Path, report: Report) -> list[Document]:
    """The documents that the report was judged on, by their hash."""
    checkpoint = open_checkpoint(source)
    calibration = Calibration(text=str(text), tokens=1024, context=64)
    documents = list(load_splits(source_tokenizer(checkpoint), detect(checkpoint), calibration).certify)
    stated: Any = report.data["certify"]
    assert stated["sha256"] == digest(documents) and stated["documents"] == len(documents)
    return documents


def decoded(state: Path, family: str) -> Values:
    """Every tensor of the model under the name that `transformers` gives it."""
    reader = StateReader(state, find_grid)
    found = {_tensor(name, family): reader.entry(name).load().decode() for name in reader.names()}
    carried = safetensors.numpy.load_file(state / "carried.safetensors")
    return found | {_tensor(name, family): array for name, array in carried.items()}


def _tensor(name: str, family: str) -> str:
    if name in OUTSIDE:
        return f"{OUTSIDE[name]}.weight"
    match = re.fullmatch(r"blocks\.(\d+)\.(?:experts\.(\d+)\.)?(\w+)", name)
    assert match is not None, name
    module = MODULES[match[3]]
    if family == "mixtral":
        module = module.replace("mlp.gate", "block_sparse_moe.gate") if match[3] == "router" else module
    if match[2] is not None:
        short = MIXTRAL[match[3]] if family == "mixtral" else module.removeprefix("mlp.")
        module = f"{'block_sparse_moe' if family == 'mixtral' else 'mlp'}.experts.{match[2]}.{short}"
    return f"model.layers.{match[1]}.{module}.weight"


def written(folder: Path, state: Path, values: Values) -> Path:
    """The values as a Hugging Face folder, with the config of the state."""
    folder.mkdir()
    tensors = {name: np.ascontiguousarray(array, dtype=np.float32) for name, array in values.items()}
    safetensors.numpy.save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_bytes((state / "config.json").read_bytes())
    return folder


def load(folder: Path, rounding: Callable[[str, Any], Any] | None = None) -> Any:
    found, report = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    assert not report["missing_keys"] and not report["unexpected_keys"]
    if rounding is not None:
        for name, module in found.named_modules():
            if name.endswith("_proj"):
                module.register_forward_pre_hook(lambda _, given, name=name: (rounding(name, given[0]),))
    return found


def rounded_inputs(state: Path, activations: str) -> Callable[[str, Any], Any]:
    """Eight-bit inputs of the matrices: one scale per token, or the calibrated one of the module."""
    maxima = json.loads((state / "plan.json").read_text())["plan"]["activation_maxima"]
    scales = {_tensor(name, "llama").removesuffix(".weight"): float(largest) / 127 for name, largest in maxima.items()}
    assert bool(scales) == activations.endswith("static")

    def apply(module: str, values: Any) -> Any:
        scale = _bfloat16_above(scales[module]) if scales else values.abs().amax(dim=-1, keepdim=True) / 127.5
        return (values / scale).round().clamp(-128, 127) * scale

    return apply


def _bfloat16_above(value: float) -> float:
    """The least bfloat16 number that is not smaller."""
    exponent = np.floor(np.log2(value)) - 7
    return float(np.ceil(value / 2**exponent) * 2**exponent)


def mean_kl(original: Any, candidate: Any, documents: list[Document]) -> float:
    """Nats per token over all positions."""
    total = torch.zeros((), dtype=torch.float64)
    with torch.inference_mode():
        for document in documents:
            tokens = torch.tensor([list(document.tokens)])
            mine, theirs = (one(tokens).logits[0].double().log_softmax(-1) for one in (original, candidate))
            total += (mine.exp() * (mine - theirs)).sum()
    return float(total) / sum(len(document.tokens) for document in documents)


def payload(folder: Path) -> int:
    """Bytes of all tensors in the safetensors files of a folder."""
    total = 0
    for path in folder.rglob("*.safetensors"):
        tensors = safetensors.torch.load_file(path)
        total += sum(tensor.nbytes for tensor in tensors.values())
    return total


def tree_bytes(state: Path) -> int:
    """What the plan counts: all but the report and what the store adds to find its entries."""
    apart = ("report.", "anyquant-manifest", "plan.json")
    return sum(p.stat().st_size for p in state.rglob("*") if p.is_file() and not p.name.startswith(apart))
