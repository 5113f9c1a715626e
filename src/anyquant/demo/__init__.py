"""The built-in demo: text that every Python carries, and a small model trained on the rest of it."""
