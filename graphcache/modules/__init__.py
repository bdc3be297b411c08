"""What users hold: an engine as a module, and any module behind a cache of graphs."""
