"""The Hugging Face folder: what the formats have in common that store each module's weight in a few tensors."""
