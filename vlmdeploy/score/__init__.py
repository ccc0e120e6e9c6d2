"""Answers and metrics: what `validate` says of a model in PyTorch or of a bundle."""
