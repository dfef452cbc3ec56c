"""From a checkpoint to graphs: reading, the PyTorch reference, and what `build` makes."""
