"""Benchmarks and end-to-end checks: run one as ``python -m bench.NAME``; results go to bench/results/."""
