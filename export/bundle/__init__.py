"""The making of a bundle."""
