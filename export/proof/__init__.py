"""Proof with PyTorch at hand: bisecting, and networks without their device."""
