"""What an operator sees of graphs that are in use: metrics, ranges for profilers, results and their reports."""
