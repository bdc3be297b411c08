"""Benchmarks and end-to-end checks: run one as ``python -m bench.NAME``, or everything side by side as ``python -m
bench``; results go to bench/results/."""
