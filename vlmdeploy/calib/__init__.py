"""What quantization needs to know about a model and its data: scores now, activation statistics and sweeps later."""
