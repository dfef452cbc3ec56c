"""The modules of each family."""
