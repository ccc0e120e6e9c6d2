"""Encoders and decoders that several families share: their config keys and tensor names."""
