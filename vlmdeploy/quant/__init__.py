"""Quantization of single weight matrices: grids, codes and scales, and how they are packed. Knows no models."""
