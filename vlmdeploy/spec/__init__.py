"""What a model is, as data: its geometry, where its weights come from, and every matrix in it. No torch."""
