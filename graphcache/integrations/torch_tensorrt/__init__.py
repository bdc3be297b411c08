"""Modules that Torch-TensorRT compiled."""
