"""One CUDA graph: captured, patched, launched, verified, destroyed. Only this layer captures and launches."""
