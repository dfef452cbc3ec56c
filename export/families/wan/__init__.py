"""Wan's modules: transformer, VAE and text encoder."""
