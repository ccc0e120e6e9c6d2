"""Many versions of one model, quantized, exported, scored and reported together."""
