"""Graphs compiled into TensorRT engines, and the routed plugin at build time."""
