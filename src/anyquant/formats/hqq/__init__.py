"""HQQ's own tensors in a Hugging Face folder, as `HQQLinear` loads them and transformers 4 saved them."""
