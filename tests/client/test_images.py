"""Images: what a model sees of a file is what a person sees."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import ViTImageProcessor

from gramfuse_client.data.batches import Encoded
from gramfuse_client.data.examples import Examples
from gramfuse_client.data.images import read_image
from gramfuse_protocol.contract.task import Task
from gramfuse_protocol.errors import DataError

ORIENTATION = 0x0112
LOOK = Task(task="image-classification", labels=("red", "blue"))

TURNS = {
    1: lambda pixels: pixels,
    2: lambda pixels: pixels[:, ::-1],
    3: lambda pixels: pixels[::-1, ::-1],
    4: lambda pixels: pixels[::-1],
    5: lambda pixels: pixels.transpose(1, 0, 2),
    6: lambda pixels: np.rot90(pixels, -1),
    7: lambda pixels: pixels.transpose(1, 0, 2)[::-1, ::-1],
    8: lambda pixels: np.rot90(pixels),
}
"""What a viewer makes of stored pixels (height, width, 3), by the orientation of EXIF 2.32, 4.6.4."""


@pytest.mark.parametrize("orientation", TURNS)
def test_a_photograph_is_seen_upright(orientation: int, tmp_path: Path) -> None:
    stored = np.arange(2 * 3 * 3, dtype=np.uint8).reshape(2, 3, 3) * 12
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    Image.fromarray(stored).save(tmp_path / "photo.png", exif=exif)
    seen = np.asarray(read_image(tmp_path / "photo.png", "here"))
    assert np.array_equal(seen, TURNS[orientation](stored))


@pytest.mark.parametrize("suffix", ["png", "tif", "pgm"])
def test_greyscale_of_16_bits_is_not_all_white(suffix: str, tmp_path: Path) -> None:
    deep = np.array([[0, 257, 1000], [32768, 65278, 65535]], np.uint16)
    path = tmp_path / f"scan.{suffix}"
    Image.fromarray(deep).save(path)
    with Image.open(path) as stored:
        assert np.array_equal(np.asarray(stored), deep), "the file has 16 bits"
    for given in (path, path.read_bytes()):
        seen = np.asarray(read_image(given, "here"))
        assert seen.shape == (2, 3, 3)
        assert np.array_equal(seen[..., 0], np.rint(deep / 257))
        assert np.array_equal(seen[..., 0], seen[..., 2])


def test_white_is_what_the_bits_of_a_tiff_file_say(tmp_path: Path) -> None:
    """Two pixels of 12 bits in three bytes: black, and the largest value."""
    tags = {256: 2, 257: 1, 258: 12, 259: 1, 262: 1, 273: 8, 277: 1, 278: 1, 279: 3}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    content = b"II*\0" + struct.pack("<I", 12) + bytes([0x00, 0x0F, 0xFF, 0x00])
    (tmp_path / "scan.tif").write_bytes(content + struct.pack("<H", len(tags)) + entries + bytes(4))
    assert np.asarray(read_image(tmp_path / "scan.tif", "here"))[0, :, 0].tolist() == [0, 255]


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("photometric", [0, 1])
def test_a_scan_whose_lowest_value_is_white_is_not_seen_as_its_negative(
    bits: int, photometric: int, tmp_path: Path
) -> None:
    """The file as TIFF 6.0 has it, not as Pillow writes one."""
    stored = [0, 1 << (bits - 2), (1 << bits) - 1]
    kind, width = ("B", 1) if bits == 8 else ("H", 2)
    pixels = struct.pack(f"<3{kind}", *stored).ljust(8, b"\0")
    tags = {256: 3, 257: 1, 258: bits, 259: 1, 262: photometric, 273: 8, 277: 1, 278: 1, 279: 3 * width}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    content = b"II*\0" + struct.pack("<I", 16) + pixels + struct.pack("<H", len(tags)) + entries + bytes(4)
    (tmp_path / "scan.tif").write_bytes(content)
    expected = [0, 64, 255] if photometric else [255, 191, 0]
    assert np.asarray(read_image(tmp_path / "scan.tif", "here"))[0, :, 0].tolist() == expected


def test_a_model_gets_an_image_as_it_is_seen(tmp_path: Path) -> None:
    """Of two pictures of one scene, one turned by the camera and one deep, a model gets the same pixels."""
    scene = np.linspace(0, 255, 16 * 16).astype(np.uint8).reshape(16, 16)
    Image.fromarray(scene).save(tmp_path / "plain.png")
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    Image.fromarray(np.rot90(scene)).save(tmp_path / "turned.png", exif=exif)
    Image.fromarray(scene.astype(np.uint16) * 257).save(tmp_path / "deep.png")
    processor = ViTImageProcessor(size={"height": 16, "width": 16})
    paths = [tmp_path / f"{name}.png" for name in ("plain", "turned", "deep")]
    encoded = Encoded(Examples(paths, None, [0, 0, 0]), processor, LOOK)
    plain, turned, deep = (encoded[i]["pixel_values"] for i in range(3))
    assert plain.std() > 0.5
    assert torch.equal(plain, turned)
    assert torch.equal(plain, deep)


@pytest.mark.parametrize("mode", ["F", "I"])
def test_an_image_of_which_nobody_knows_what_is_white_is_refused(mode: str, tmp_path: Path) -> None:
    Image.new(mode, (2, 2)).save(tmp_path / "odd.tif")
    with pytest.raises(DataError, match=r"here: .* white .*8 or 16 bits"):
        read_image(tmp_path / "odd.tif", "here")


def test_an_image_that_is_cut_short_is_named(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    Image.fromarray(noise).save(tmp_path / "whole.png")
    cut = (tmp_path / "whole.png").read_bytes()[:4000]
    with pytest.raises(DataError, match="here: not a readable image"):
        read_image(cut, "here")
