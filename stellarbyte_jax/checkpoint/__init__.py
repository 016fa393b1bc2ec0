"""Checkpoints of runs, and models as they come from a directory of any kind."""
