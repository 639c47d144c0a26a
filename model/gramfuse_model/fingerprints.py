"""What a base model and its tokenizer are known by, where no plan pins them."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch
from torch import nn

from gramfuse_model.base import BUNDLED, Base
from gramfuse_protocol.statistics_file import Origin


def origin(base: Base, name: str) -> Origin:
    """Return what a statistics file says of the base model.

    Args:
        name: as whoever measures calls it. Of a directory only the last part is kept: the rest is nobody's business.
    """
    directory = name not in BUNDLED and Path(name).expanduser().is_dir()
    return Origin(name=f"./{Path(name).resolve().name}" if directory else name, weights=tensor_digests(base.model))


def tensor_digests(model: nn.Module) -> dict[str, str]:
    """Return the SHA-256 of each parameter and persistent buffer, by name.

    The hash runs over dtype and shape as one line of text (`float32 384,384` and a newline), then the little-endian
    bytes in C order.
    """
    return {name: _digest(tensor) for name, tensor in sorted(model.state_dict().items())}


def _digest(tensor: torch.Tensor) -> str:
    tensor = tensor.detach().cpu().contiguous()
    hasher = hashlib.sha256(f"{str(tensor.dtype).removeprefix('torch.')} {','.join(map(str, tensor.shape))}\n".encode())
    hasher.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return hasher.hexdigest()
