"""From PyTorch to engines, and engines in traced programs: ONNX export, ``compile``, the operator of programs."""
