"""The smallest artifact within stated limits, over abstract groups and callables; knows no model, format or runtime."""
