"""MLX: what mlx-lm loads."""
