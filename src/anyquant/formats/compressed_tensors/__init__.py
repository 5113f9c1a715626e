"""compressed-tensors: the Hugging Face folder that transformers, vLLM and SGLang load."""
