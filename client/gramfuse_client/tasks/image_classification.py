"""Image classification: one label for each image.

| input | label |
|---|---|
| `image`: a path relative to the source, or the bytes of an image file | a label of the plan |
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gramfuse_client.data.columns import Reader
from gramfuse_client.data.formats import Row
from gramfuse_client.data.images import check_image, check_pillow, read_image
from gramfuse_client.tasks.classification import ClassificationAtSilo
from gramfuse_client.tasks.registry import register
from gramfuse_protocol.contract.task import Task
from gramfuse_protocol.errors import DataError
from gramfuse_protocol.text import quoted

if TYPE_CHECKING:
    from gramfuse_client.data.examples import Examples
    from gramfuse_model.loading.base_model import Base
    from gramfuse_model.probing.batch import Batch

ROWS = 1024
"""Rows of an image in a layer, if the model's configuration does not say."""


@register
class ImageClassificationAtSilo(ClassificationAtSilo):
    """Image classification. Images are read lazily."""

    name = "image-classification"
    inputs_name = "images"

    def check_ready(self) -> None:
        check_pillow()

    def input(self, row: Row, reader: Reader, where: str) -> Path | bytes:
        """Return an image, after checking its first bytes; a dataset's column holds `bytes` or `path`, or both."""
        column = reader.columns.image
        value = reader.value(row, column, where)
        if isinstance(value, dict):
            value = value.get("bytes") or value.get("path")
        if not isinstance(value, str | bytes) or not value:
            raise DataError(f"{where}: column {column!r} must hold the path of an image, found {quoted(value)}")
        image = reader.folder / value if isinstance(value, str) else value
        if isinstance(image, Path) and not _is_file(image):
            raise DataError(f"{where}: column {column!r}: no such file: {quoted(str(image))}")
        check_image(image, f"{where}: column {column!r}")
        return image

    def encode(self, examples: Examples, tokenizer: Any, task: Task) -> None:
        return None

    def encode_one(self, examples: Examples, index: int, tokenizer: Any) -> dict[str, Any]:
        from gramfuse_model.probing.public_images import mode_of

        source = examples.inputs[index]
        where = "an image" if isinstance(source, bytes) else str(source)
        image = read_image(source, where, mode_of(tokenizer))  # type: ignore[arg-type]  # `input` returns Path or bytes
        return {
            "pixel_values": tokenizer(image, return_tensors="pt")["pixel_values"][0],
            "labels": examples.labels[index],
        }

    def inputs(self, rows: Sequence[dict[str, Any]], tokenizer: Any) -> Batch:
        import torch

        return {"pixel_values": torch.stack([row["pixel_values"] for row in rows])}

    def rows_of(self, base: Base, task: Task) -> int:
        """Return the number of patches."""
        size, patch = (getattr(base.model.config, key, None) for key in ("image_size", "patch_size"))
        return (size // patch) ** 2 + 1 if isinstance(size, int) and isinstance(patch, int) else ROWS


def _is_file(path: Path) -> bool:
    """Return whether a path is a file; False also if it is too long or not accessible."""
    try:
        return path.is_file()
    except OSError:
        return False
