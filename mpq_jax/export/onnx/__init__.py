"""Export to ONNX; the modules of this package import onnx, so they are imported when used."""

OPSETS = range(21, 26)  # of ONNX's operators: 21 is the first with 4-bit tensors, 25 with 2-bit
