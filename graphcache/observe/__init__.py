"""What an operator sees of graphs that are in use: metrics, ranges for profilers, results and their reports."""

from graphcache.observe.metrics import Collector as Collector
from graphcache.observe.ranges import nvtx_ranges as nvtx_ranges

__all__ = ["Collector", "nvtx_ranges"]
