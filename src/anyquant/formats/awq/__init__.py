"""AWQ: 4-bit integers packed along the output axis: what AutoAWQ wrote; transformers, vLLM and SGLang load it."""
