"""Families of models as data."""
