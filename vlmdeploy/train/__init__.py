"""Training of models built from a family's config.json: stages, loop and checkpoints."""
