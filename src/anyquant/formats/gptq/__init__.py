"""GPTQ: integers packed along the input axis, as GPTQModel, transformers, vLLM and SGLang load them."""
