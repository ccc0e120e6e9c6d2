"""The ONNX graphs of a model, layer by layer, in the dialect of each kind of target."""
