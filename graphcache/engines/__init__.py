"""TensorRT: the library, engines, contexts, outputs of unknown shape, building. The only room that imports it."""
