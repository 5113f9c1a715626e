"""8-bit floats as `transformers`, vLLM and SGLang load them under `quant_method: fp8`, DeepSeek's format."""
