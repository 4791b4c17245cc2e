"""Checkpoints to bundles: reading weights, PyTorch modules written for tracing, and their export to ONNX."""
