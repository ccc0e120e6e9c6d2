"""Training: stages, loop and checkpoints for models built from a family's own config.json."""
