"""From a call to a verified graph, or the reason why there is none."""
