"""The way of a call: hit, miss, eager; captures in the background."""
