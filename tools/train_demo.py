"""Train the demo model: a small Llama on the text that every CPython carries. Minutes on a GPU, 20 on a CPU core.

    python tools/train_demo.py --output FOLDER [--steps N] [--batch N] [--seed N] [--device cpu|cuda]

Writes a complete Hugging Face folder: weights in bfloat16 in two shards, byte-level BPE tokenizer, configs. Needs
torch, transformers, tokenizers and safetensors; AnyQuant itself need not be installed. The text is read from the
running Python (`anyquant.demo.text`), and the topics held out there are never trained on: "calibrate" and "select"
topics choose the best step, "certify" topics are only measured at the end.
"""

import argparse
import copy
import json
import math
import sys
import time
from pathlib import Path
from typing import Any

import tokenizers
import torch
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "src"))

from anyquant.demo.text import split_documents, training_documents

VOCABULARY = 2048
CONTEXT = 512
BEGIN, END = "<s>", "</s>"


def train_tokenizer(texts: list[str]) -> tokenizers.Tokenizer:
    """Byte-level BPE with GPT-2's pre-tokenizer; a whole document gets <s> (id 0) in front."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[BEGIN, END],
        initial_alphabet=sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single=f"{BEGIN} $A", pair=f"{BEGIN} $A {BEGIN}:1 $B:1", special_tokens=[(BEGIN, 0)]
    )
    return tokenizer


def new_model() -> LlamaForCausalLM:
    """5.77 M parameters: 11.5 MB in bfloat16. Widths are multiples of 256, so that every k-quant fits."""
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=CONTEXT,
        rms_norm_eps=1e-5,
        bos_token_id=0,
        eos_token_id=1,
        tie_word_embeddings=False,
        attn_implementation="sdpa",
    )
    return LlamaForCausalLM(config)


def add_dropout(model: LlamaForCausalLM, probability: float) -> None:
    """Dropout after the embedding and each feed-forward: Llama has none, and the text is small."""

    def drop(module: torch.nn.Module, inputs: Any, output: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.dropout(output, probability, module.training)

    model.model.embed_tokens.register_forward_hook(drop)
    for block in model.model.layers:
        block.mlp.register_forward_hook(drop)


def held_out_windows(tokenizer: tokenizers.Tokenizer, splits: tuple[str, ...]) -> list[torch.Tensor]:
    documents = [document for split in splits for document in split_documents(split)]
    return [torch.tensor(tokenizer.encode(document.text).ids[:CONTEXT]) for document in documents]


@torch.no_grad()
def held_out_loss(model: LlamaForCausalLM, windows: list[torch.Tensor], device: str) -> float:
    """Mean negative log likelihood per token, nats."""
    model.eval()
    total, count = 0.0, 0
    for window in windows:
        ids = window[None].to(device)
        logits = model(ids, use_cache=False).logits[0, :-1].float()
        total += float(torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum"))
        count += ids.shape[1] - 1
    model.train()
    return total / count


def optimizer_for(model: LlamaForCausalLM, rate: float) -> torch.optim.AdamW:
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim == 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.95))


def rate_at(step: int, steps: int, peak: float) -> float:
    """Linear warm-up, then a cosine down to 2 % of the peak."""
    warm = min(100, max(1, steps // 10))
    if step < warm:
        return peak * (step + 1) / warm
    progress = (step - warm) / max(1, steps - warm)
    return peak * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress)))


def train(
    model: LlamaForCausalLM, stream: torch.Tensor, watch: list[torch.Tensor], options: argparse.Namespace
) -> None:
    """Random windows of the training stream; the weights of the best watched step are left in `model`."""
    device = options.device
    optimizer = optimizer_for(model, options.rate)
    generator = torch.Generator().manual_seed(options.seed)
    every = max(1, options.steps // 25)
    best, kept, began = math.inf, copy.deepcopy(model.state_dict()), time.monotonic()
    offsets = torch.arange(CONTEXT)
    for step in range(options.steps):
        for group in optimizer.param_groups:
            group["lr"] = rate_at(step, options.steps, options.rate)
        starts = torch.randint(0, len(stream) - CONTEXT, (options.batch,), generator=generator)
        ids = stream[starts[:, None] + offsets].to(device)
        with torch.autocast(torch.device(device).type, torch.bfloat16):
            logits = model(ids, use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits[:, :-1].float().flatten(0, 1), ids[:, 1:].flatten())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if (step + 1) % every == 0 or step + 1 == options.steps:
            watched = held_out_loss(model, watch, device)
            if watched < best:
                best, kept = watched, copy.deepcopy(model.state_dict())
            print(
                f"step {step + 1:5d}  train {loss.item():.3f}  held out {watched:.3f}"
                f"  best perplexity {math.exp(best):.1f}  {time.monotonic() - began:.0f} s",
                flush=True,
            )
    model.load_state_dict(kept)


def write(model: LlamaForCausalLM, tokenizer: tokenizers.Tokenizer, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    model.generation_config = GenerationConfig(bos_token_id=0, eos_token_id=1)
    model.save_pretrained(folder, max_shard_size="7MB")
    tokenizer.save(str(folder / "tokenizer.json"))
    about = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BEGIN,
        "eos_token": END,
        "model_max_length": CONTEXT,
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train AnyQuant's demo model.")
    parser.add_argument("--output", type=Path, required=True, help="folder to write")
    parser.add_argument("--steps", type=int, default=None, help="default: 3000 on a GPU, 1500 on a CPU")
    parser.add_argument("--batch", type=int, default=None, help="windows per step; default: 32 on a GPU, 8 on a CPU")
    parser.add_argument("--rate", type=float, default=2e-3, help="peak learning rate")
    parser.add_argument("--dropout", type=float, default=0.1)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    on_gpu = options.device.startswith("cuda")
    options.steps = options.steps or (3000 if on_gpu else 1500)
    options.batch = options.batch or (32 if on_gpu else 8)
    return options


def main() -> None:
    options = parse()
    torch.manual_seed(options.seed)
    texts = training_documents()
    tokenizer = train_tokenizer(texts)
    ids = [[0, *tokenizer.encode(text, add_special_tokens=False).ids, 1] for text in texts]
    stream = torch.tensor([token for document in ids for token in document])
    model = new_model().to(options.device).train()
    add_dropout(model, options.dropout)
    parameters = sum(p.numel() for p in model.parameters())
    print(f"{len(texts)} documents, {len(stream)} tokens, {parameters} parameters, {options.device}", flush=True)
    train(model, stream, held_out_windows(tokenizer, ("calibrate", "select")), options)
    model = model.to(torch.bfloat16)
    loss = held_out_loss(model, held_out_windows(tokenizer, ("certify",)), options.device)
    write(model.cpu(), tokenizer, options.output)
    size = sum(path.stat().st_size for path in options.output.iterdir())
    print(f"held-out perplexity (certify topics) {math.exp(loss):.2f}, vocabulary {VOCABULARY}, {size} bytes written")


if __name__ == "__main__":
    main()
