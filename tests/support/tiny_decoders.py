"""Files of tiny decoders with random weights, as those that people download."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from pyrexport.export.families.tiny_decoder import TinyDecoder
from pyrexport.runtime.model.families import TinyDecoderConfig
from safetensors.torch import save_file

WIDTHS = (8, 8, 4, 4)


def write_tiny_decoder(
    path: Path,
    change: Callable[[dict[str, torch.Tensor]], None] = lambda tensors: None,
    **config: Any,
) -> Path:
    """Write one, with an encoder beside it and a growth that has rows which nobody uses; `.pth` by `torch.save`."""
    torch.manual_seed(0)
    decoder = TinyDecoder(TinyDecoderConfig(**{"widths": WIDTHS, **config}))
    # By PyTorch's own gain a block would leave nearly what it was given, and a fault in it nothing to be seen.
    tensors = {name: tensor * (2 if tensor.ndim == 4 else 1) for name, tensor in decoder.state_dict().items()}
    growth = "decoder.7.conv.weight"
    tensors[growth] = torch.cat([torch.full_like(tensors[growth], 9.0), tensors[growth]])
    tensors["encoder.0.weight"] = torch.zeros(4, 3, 3, 3)
    change(tensors)
    if path.suffix == ".pth":
        torch.save(tensors, path)
    else:
        save_file(tensors, path)
    return path
