"""One graph: captured, replayed, verified, destroyed. The only room that captures and launches."""
