"""Loops whose steps are replays of one graph."""
