"""Answers and metrics: `validate` for a model in PyTorch or a bundle."""
