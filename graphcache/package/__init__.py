"""The package file: engines, weights, options and what to prepare, in one file without code."""
