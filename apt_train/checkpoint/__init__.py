"""Checkpoints of a run: all it needs to go on as if it had never stopped."""
