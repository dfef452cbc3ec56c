"""Recipes made on real sampling runs: what quantisation needs to know about a model's activations."""
