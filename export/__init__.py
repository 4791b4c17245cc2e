"""Convert checkpoints to bundles: read weights, trace PyTorch modules, and export them to ONNX or AOTInductor."""
