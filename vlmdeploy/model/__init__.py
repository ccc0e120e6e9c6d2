"""The PyTorch reference: readable modules built from a ModelSpec, and their weights read from a checkpoint."""
