"""Synthetic test images, preprocessed by a model's image processor."""

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
"""Height and width of the first test image, which shows the processor's output size."""

MESSAGE_CHARACTERS = 300
"""Maximum length at which an error quotes an image processor's message."""


def mode_of(processor: Any) -> str:
    """Return the Pillow mode of a processor's input images: `L` if it has the mean of a single channel, else `RGB`."""
    mean = getattr(processor, "image_mean", None)
    return "L" if isinstance(mean, Sequence) and len(mean) == 1 else "RGB"


def public_images(processor: Any) -> torch.Tensor:
    """Return preprocessed images of waves with different directions, lengths and colours.

    Returns:
        (images, channels, height, width), in the processor's output size.

    Raises:
        ModelError: if the processor does not produce such an array, or the output size depends on the image.
    """
    height, width = _preprocess(processor, [_wave(processor, 0, USUAL, USUAL)]).shape[2:]
    images = _preprocess(processor, [_wave(processor, n, height, width) for n in range(len(PUBLIC_TEXT))])
    wide = _preprocess(processor, [_wave(processor, 0, height, 2 * width)])
    if wide.shape[2:] != images.shape[2:]:
        raise ModelError(
            f"the base model's {type(processor).__name__} produces images of different sizes, {_size(images)} and "
            f"{_size(wide)} (height × width), but a batch needs one size; set "
            '"do_resize": true and "size": {"height": …, "width": …} in its preprocessor_config.json'
        )
    return images


def _size(images: torch.Tensor) -> str:
    return " × ".join(map(str, images.shape[2:]))


def _preprocess(processor: Any, images: list[Any]) -> torch.Tensor:
    """Preprocess images; returns (images, channels, height, width)."""
    name = type(processor).__name__
    try:
        output = processor(images, return_tensors="pt")
    except Exception as error:  # processors raise all kinds of errors
        raise ModelError(
            f"the base model's {name} cannot process an image: {type(error).__name__}: "
            f"{one_line(str(error), MESSAGE_CHARACTERS)}; check its preprocessor_config.json, or use another model"
        ) from error
    pixels = output.get("pixel_values")
    if not isinstance(pixels, torch.Tensor) or pixels.dim() != 4:
        shapes = ", ".join(f"{key} {tuple(getattr(value, 'shape', ()))}" for key, value in output.items())
        raise ModelError(
            f"the base model's {name} converts {len(images)} images to {shapes}, but gramfuse needs pixel_values "
            "(images, channels, height, width); use another model"
        )
    return pixels


def _wave(processor: Any, number: int, height: int, width: int) -> Any:
    """Return a wave as a Pillow image."""
    try:
        from PIL import Image
    except ImportError:
        raise ModelError("testing an image model needs Pillow; run: pip install 'gramfuse[images]'") from None
    y, x = np.linspace(0, 1, height).reshape(-1, 1, 1), np.linspace(0, 1, width).reshape(1, -1, 1)
    direction = math.pi * number / len(PUBLIC_TEXT)
    along = x * math.cos(direction) + y * math.sin(direction)
    values = np.sin(2 * math.pi * (1 + number) * along + np.arange(3))  # (height, width, 3)
    image = Image.fromarray(np.rint(127.5 * (1 + values)).astype(np.uint8))
    return image.convert(mode_of(processor))
