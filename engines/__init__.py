"""Builds TensorRT engines from a bundle's ONNX graphs. Needs no PyTorch, so it also runs on the target device."""
