"""Safetensors files whose bytes are determined by their content: a document and the tensors that it describes.

A reader recomputes the header and compares, so a truncated, edited or differently assembled file is refused.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, Literal, NamedTuple, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ValidationError

from gramfuse_protocol.bounds import (
    FEATURES,
    HEADER_CHARACTERS,
    LAYOUT_CHARACTERS,
    PLAN_CHARACTERS,
    check_keys,
    parse_json,
)
from gramfuse_protocol.contract.form import Block
from gramfuse_protocol.errors import ContributionError, RunDirectoryError, disk_is_full
from gramfuse_protocol.files import replacing
from gramfuse_protocol.text import one_line, quoted

HEADER_LIMIT = 2 * (LAYOUT_CHARACTERS + PLAN_CHARACTERS + HEADER_CHARACTERS)
"""Maximum number of bytes of a header: a layout, a plan, and two lines for each tensor."""

CHUNK = 2**20
"""Number of elements that are read at a time."""

SHORT = {"float32": "F32", "float64": "F64"}
"""Names of dtypes in safetensors."""


class Names(NamedTuple):
    """What a kind of file is called, and the commands that write and read it."""

    title: str
    made_by: str
    read_by: str


NAMES = {
    "gramfuse": Names("statistics file", "gramfuse measure", "gramfuse merge"),
    "gramfuse-head": Names("head file", "gramfuse head measure", "gramfuse head fit"),
}
"""All kinds of files, by the key of the document in the header's metadata."""


class Document(Protocol):
    """The document of a file: a pydantic model that knows the file's tensors."""

    @property
    def blocks(self) -> tuple[Block, ...]:
        """All tensors, in the file's order."""
        ...


D = TypeVar("D", bound=Document)


@dataclass(frozen=True)
class Sealed(Generic[D]):
    """A checked file.

    Args:
        about: its document.
        start: offset of the tensor data in bytes.
        sha256: its verified digest.
    """

    about: D
    start: int
    sha256: str


@dataclass(frozen=True)
class Kind(Generic[D]):
    """A kind of file.

    Args:
        key: of NAMES.
        document: type of the document, a pydantic model with a `version`, which is 1.
        dtype: of all tensors; they are stored as little-endian.
    """

    key: str
    document: type[D]
    dtype: Literal["float32", "float64"]

    @property
    def names(self) -> Names:
        """What it is called."""
        return NAMES[self.key]

    @property
    def stored(self) -> np.dtype[Any]:
        """The dtype of its tensors on the disk."""
        return np.dtype(self.dtype).newbyteorder("<")

    def write(self, path: Path, about: D, tensors: Callable[[], Iterator[NDArray[Any]]]) -> str:
        """Write a file atomically, readable only by its owner, and return its digest.

        Args:
            tensors: yields the tensors in the file's order and dtype; called twice, for the digest and for the file.

        Raises:
            RunDirectoryError: if it cannot be written.
        """
        assert isinstance(about, BaseModel)  # noqa: S101
        text = about.model_dump_json(by_alias=True)
        hasher = hashlib.sha256(text.encode())
        for array in tensors():
            hasher.update(self._bytes(array))
        sha256 = hasher.hexdigest()
        header = self._header(text, sha256, about.blocks)
        try:
            with replacing(path, private=True) as temporary, temporary.open("wb") as file:
                file.write(len(header).to_bytes(8, "little") + header)
                for array in tensors():
                    file.write(self._bytes(array))
        except OSError as error:
            reason = "no space left on the disk; make room" if disk_is_full(error) else str(error)
            raise RunDirectoryError(f"{path}: cannot be written: {reason}") from None
        return sha256

    def read(self, path: Path) -> Sealed[D]:
        """Read and check a file: header, size, digest, and that all values are finite.

        Raises:
            ContributionError: naming the file, and the tensor if there is one, if it is not what `write` writes.
        """
        try:
            with path.open("rb") as file:
                size = os.fstat(file.fileno()).st_size
                length = int.from_bytes(file.read(8), "little")
                if size < 8 or not 2 <= length <= min(HEADER_LIMIT, size - 8):
                    raise ContributionError(
                        f"{path}: is not a {self.names.title}, or is truncated: its header claims {length:,} "
                        f"bytes, but the file has {size:,}"
                    )
                header = file.read(length)
                text, sha256 = self._metadata(path, header)
                about = self._about(path, text)
                self._check_header(path, header, self._header(text, sha256, about.blocks))
                start = 8 + length
                expected = start + sum(self.stored.itemsize * block.entries for block in about.blocks)
                if size != expected:
                    raise ContributionError(
                        f"{path}: has {size:,} bytes, expected {expected:,}: "
                        + ("it is truncated; copy it again" if size < expected else "there is extra data at its end")
                    )
                hasher = hashlib.sha256(text.encode())
                bad_values = []
                for block in about.blocks:
                    bad = 0
                    for first in range(0, block.entries, CHUNK):
                        values = np.fromfile(file, self.stored, min(CHUNK, block.entries - first))
                        hasher.update(values.data)
                        bad += values.size - int(np.count_nonzero(np.isfinite(values)))
                    bad_values.append((block, bad))
        except OSError as error:
            raise ContributionError(f"{path}: cannot be read: {error.strerror or error}") from None
        if hasher.hexdigest() != sha256:
            raise ContributionError(
                f"{path}: was changed after it was written: its SHA-256 does not match the one in its header; copy it "
                "again, or measure again"
            )
        for block, bad in bad_values:
            check_finite(path, block, bad)
        return Sealed(about, start, sha256)

    def _bytes(self, array: NDArray[Any]) -> memoryview:
        return np.ascontiguousarray(array, self.stored).data

    def _header(self, text: str, sha256: str, blocks: tuple[Block, ...]) -> bytes:
        """Return the header that these tensors must have, padded with spaces to a multiple of 8."""
        header: dict[str, Any] = {"__metadata__": {self.key: text, "sha256": sha256}}
        start = 0
        for block in blocks:
            stop = start + self.stored.itemsize * block.entries
            header[block.name] = {
                "dtype": SHORT[self.dtype],
                "shape": list(block.shape),
                "data_offsets": [start, stop],
            }
            start = stop
        encoded = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
        return encoded + b" " * (-len(encoded) % 8)

    def _metadata(self, path: Path, header: bytes) -> tuple[str, str]:
        """Return the metadata document and the digest in a header."""
        try:
            metadata = parse_json(header, HEADER_LIMIT, FEATURES)["__metadata__"]
            text, sha256 = metadata.get(self.key), metadata["sha256"]
            others = [names for key, names in NAMES.items() if key in metadata]
        except (ValueError, KeyError, TypeError, AttributeError):
            text, sha256, others = None, None, []
        if text is None and others:
            raise ContributionError(
                f"{path}: is a {others[0].title}, not a {self.names.title}: {others[0].read_by} reads it. Make a "
                f"{self.names.title} with: {self.names.made_by}"
            )
        if not isinstance(text, str) or not isinstance(sha256, str) or any("\ud800" <= c <= "\udfff" for c in text):
            raise ContributionError(
                f"{path}: is not a {self.names.title}: its header has no gramfuse metadata; make one with: "
                f"{self.names.made_by}"
            )
        return text, sha256

    def _about(self, path: Path, text: str) -> D:
        assert issubclass(self.document, BaseModel)  # noqa: S101
        try:
            document = parse_json(text, HEADER_LIMIT, FEATURES)
            version = document.get("version", 1) if isinstance(document, dict) else 1
            if type(version) is not int or version != 1:
                raise ContributionError(
                    f"{path}: has format version {repr(version)[:50]}, but this gramfuse reads version 1; use the "
                    "gramfuse that wrote it, or measure again"
                )
            check_keys(document, self.document)
            return self.document.model_validate_json(text, by_alias=True, by_name=False)
        except ValidationError as error:
            problem = error.errors(include_url=False, include_input=False)[0]
            key = quoted(".".join(map(str, problem["loc"])) or "the document")
            message = one_line(problem["msg"], 1000)
            raise ContributionError(f"{path}: its metadata is invalid: {key}: {message}") from None
        except ValueError as error:
            raise ContributionError(f"{path}: its metadata is invalid: {one_line(str(error), 1000)}") from None

    def _check_header(self, path: Path, header: bytes, expected: bytes) -> None:
        if header == expected:
            return
        actual, wanted = json.loads(header), json.loads(expected)
        for name in sorted(actual.keys() | wanted.keys()):
            if actual.get(name) != wanted.get(name):
                raise ContributionError(
                    f"{path}: tensor {quoted(name)} is {_entry_text(actual.get(name), 'missing')}, but the document in "
                    f"the file expects {_entry_text(wanted.get(name), 'no such tensor')}; measure again"
                )
        raise ContributionError(f"{path}: its header differs from what gramfuse writes; do not edit it; measure again")


def _entry_text(entry: Any, absent: str) -> str:
    return absent if entry is None else json.dumps(entry)[:200]


def check_finite(path: Path, block: Block, bad: int) -> None:
    """Raise ContributionError if a tensor of a file has values that are not finite.

    Args:
        bad: how many.
    """
    if bad:
        raise ContributionError(
            f"{path}: tensor {block.name!r} has {bad} NaN or infinite values out of {block.entries}; training diverged"
        )
