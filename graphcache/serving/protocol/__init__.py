"""The Open Inference Protocol, version 2, as pure functions: bytes to named tensors and back. Knows no server."""
