"""What the tests share: oracles and makers of small checkpoints."""
