"""The two fused attention operators, a folder each: definition, Triton kernel, ONNX function and TensorRT plugin."""
