"""Everything that runs on the device: the chain in NumPy, and the data that it works from. Never PyTorch."""
