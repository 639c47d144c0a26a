"""Images that are nobody's data, as an image processor makes them for a model."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from gramfuse_model.probing.public_text import PUBLIC_TEXT
from gramfuse_protocol.errors import ModelError
from gramfuse_protocol.text import one_line

USUAL = 224
"""Height and width of an image that shows what an image processor makes of one."""

MOST = 300
"""Characters that are shown of what an image processor says when it fails."""


def mode_of(processor: Any) -> str:
    """Return Pillow's name for the images that a processor takes: `L` if it has the mean of one channel, else `RGB`."""
    mean = getattr(processor, "image_mean", None)
    return "L" if isinstance(mean, Sequence) and len(mean) == 1 else "RGB"


def public_images(processor: Any) -> torch.Tensor:
    """Return waves of different direction, length and colour, through an image processor.

    Returns:
        (images, channels, height, width), of the size that the processor makes.

    Raises:
        ModelError: if it makes something else of images, or if their size depends on the image.
    """
    height, width = _made(processor, [_wave(processor, 0, USUAL, USUAL)]).shape[2:]
    images = _made(processor, [_wave(processor, n, height, width) for n in range(len(PUBLIC_TEXT))])
    wide = _made(processor, [_wave(processor, 0, height, 2 * width)])
    if wide.shape[2:] != images.shape[2:]:
        raise ModelError(
            f"the base model's {type(processor).__name__} makes images of {_size(images)} of some and of "
            f"{_size(wide)} of others (height and width), as the images are, and a batch takes one size; set "
            '"do_resize": true and "size": {"height": …, "width": …} in its preprocessor_config.json'
        )
    return images


def _size(images: torch.Tensor) -> str:
    return " × ".join(map(str, images.shape[2:]))


def _made(processor: Any, images: list[Any]) -> torch.Tensor:
    """Return images as a processor makes them."""
    name = type(processor).__name__
    try:
        made = processor(images, return_tensors="pt")
    except Exception as error:  # processors raise what they like
        raise ModelError(
            f"the base model's {name} cannot take an image: {type(error).__name__}: {one_line(str(error), MOST)}; see "
            "to its preprocessor_config.json, or take another model"
        ) from error
    pixels = made.get("pixel_values")
    if not isinstance(pixels, torch.Tensor) or pixels.dim() != 4:
        found = ", ".join(f"{key} {tuple(getattr(value, 'shape', ()))}" for key, value in made.items())
        raise ModelError(
            f"the base model's {name} makes {found} of {len(images)} images, and gramfuse takes models of "
            "pixel_values (images, channels, height, width); take another model"
        )
    return pixels


def _wave(processor: Any, number: int, height: int, width: int) -> Any:
    """Return a wave as a Pillow image."""
    try:
        from PIL import Image
    except ImportError:
        raise ModelError("trying a model of images needs Pillow; run: pip install 'gramfuse[images]'") from None
    y, x = np.linspace(0, 1, height).reshape(-1, 1, 1), np.linspace(0, 1, width).reshape(1, -1, 1)
    direction = math.pi * number / len(PUBLIC_TEXT)
    along = x * math.cos(direction) + y * math.sin(direction)
    values = np.sin(2 * math.pi * (1 + number) * along + np.arange(3))  # (height, width, 3)
    image = Image.fromarray(np.rint(127.5 * (1 + values)).astype(np.uint8))
    return image.convert(mode_of(processor))
