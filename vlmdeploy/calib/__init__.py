"""Samples through the float model, layer by layer: statistics of each linear's inputs, and codes chosen by them."""
