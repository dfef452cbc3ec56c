"""Weights from a checkpoint to a file, streamed."""
