"""Calls whose sizes lie between buckets: padded to the next bucket, answered by its graph, cropped."""
