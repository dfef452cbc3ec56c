"""From a checkpoint to graphs: reading, the PyTorch reference, and what `build` makes."""

import logging

# Where ExecuTorch is installed, diffusers imports torchao, which reports at length what it could not load.
for _name in ("torchao", "torch.utils._pytree"):
    logging.getLogger(_name).setLevel(logging.ERROR)
