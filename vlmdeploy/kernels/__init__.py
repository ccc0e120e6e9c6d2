"""A linear layer whose rows choose between two sets of int4 weights: packing, GPU kernels, and running them."""
