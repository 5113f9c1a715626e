"""The nouns of AnyQuant, without input or output: what a tensor, a grid, a decision and a plan are."""
