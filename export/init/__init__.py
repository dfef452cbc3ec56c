"""Checkpoints made: of random weights, to try things on."""
