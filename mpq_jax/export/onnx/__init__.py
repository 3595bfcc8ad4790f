"""Export to ONNX graphs with integer kernels."""
