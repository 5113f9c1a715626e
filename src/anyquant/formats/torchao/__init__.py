"""torchao's tensor subclasses, flattened into safetensors, as `transformers` loads them."""
