"""Reads images for an image processor: upright, in three or one channels of 8 bits."""

from __future__ import annotations

from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np

from gramfuse_protocol.errors import DataError

BITS_PER_SAMPLE = 258
"""TIFF tag: how many of 16 bits are used."""


PHOTOMETRIC = 262
"""TIFF tag: whether the lowest value is black or white."""

WHITE_IS_ZERO = 0


def check_pillow() -> None:
    """Raise DataError if Pillow is not installed."""
    try:
        import PIL.Image  # noqa: F401
    except ImportError:
        raise DataError("reading images needs Pillow; run: pip install 'gramfuse[images]'") from None


def check_image(image: Path | bytes, where: str) -> None:
    """Check an image by its first bytes; raise what `read_image` raises, except for damage further on."""
    with _open(image, where):
        pass


def read_image(image: Path | bytes, where: str, mode: str = "RGB") -> Any:
    """Read an image with Pillow, rotated by its EXIF orientation; 16-bit greyscale is scaled to 8 bits, black at 0.

    Args:
        where: names the image in errors.
        mode: Pillow's mode, RGB or L, from `gramfuse_model.probing.public_images.mode_of`.

    Raises:
        DataError: if Pillow is not installed or cannot read the image, or its white value is unknown.
    """
    from PIL import ImageOps

    with _open(image, where) as opened:
        try:
            upright = ImageOps.exif_transpose(opened)
            if upright.mode.startswith("I"):
                upright = _in_8_bits(upright, *_black_and_white(opened))
            return upright.convert(mode)
        except (OSError, ValueError, SyntaxError) as error:
            raise DataError(f"{where}: not a readable image: {error}") from None


def _open(image: Path | bytes, where: str) -> Any:
    check_pillow()
    from PIL import Image

    try:
        opened = Image.open(image if isinstance(image, Path) else BytesIO(image))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise DataError(f"{where}: not a readable image: {error}") from None
    mode = opened.mode
    if mode == "F" or (mode == "I" and opened.format != "PPM"):  # for PPM, mode I is 16 bits, scaled by Pillow
        opened.close()
        raise DataError(
            f"{where}: its values are {'floating-point' if mode == 'F' else 'signed or 32-bit'}, so its white value is "
            "unknown; convert it to 8 or 16 bits"
        )
    return opened


def _black_and_white(opened: Any) -> tuple[int, int]:
    """Return the black and the white value of greyscale with more than 8 bits, which Pillow does not scale."""
    tags = getattr(opened, "tag_v2", {})
    most = (1 << int(tags.get(BITS_PER_SAMPLE, (16,))[0])) - 1
    return (most, 0) if tags.get(PHOTOMETRIC) == WHITE_IS_ZERO else (0, most)


def _in_8_bits(grey: Any, black: int, white: int) -> Any:
    from PIL import Image

    values = (np.asarray(grey, np.float64) - black) * (255 / (white - black))
    return Image.fromarray(np.clip(np.rint(values), 0, 255).astype(np.uint8))
