"""Lines of an egress ledger: their content, and how to write and parse them."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, PlainSerializer, ValidationError, ValidationInfo

from gramfuse_protocol.bounds import HEADER_CHARACTERS, check_size
from gramfuse_protocol.canonical import canonical_json
from gramfuse_protocol.contract.plan_sections import Sha256
from gramfuse_protocol.frozen import LegibleFrozen
from gramfuse_protocol.text import one_line

NO_LINE = "0" * 64


def _from_text(value: object, info: ValidationInfo) -> object:
    return int(value) if info.mode == "json" and isinstance(value, str) and value.isascii() else value


Count = Annotated[int, Field(ge=0, lt=2**53)]

# Flower's run ids have 64 bits, more than a number in canonical JSON, so they are written as text.
RunId = Annotated[int, Field(ge=0, lt=2**64), BeforeValidator(_from_text), PlainSerializer(str, when_used="json")]


class Item(LegibleFrozen):
    """One array or value that left.

    Args:
        dtype: numpy's name of an array's dtype; otherwise "json" or "text", with shape ().
        bytes: size in bytes.
        sha256: digest of those bytes.
    """

    name: str
    dtype: str
    shape: tuple[Count, ...]
    bytes: Count
    sha256: Sha256


class Entry(LegibleFrozen):
    """The record of one message or, with kind "clear", of what the silo's owner cleared.

    Args:
        plan: digest of the plan; empty if unknown.
        session: nonce of the session; empty if unknown.
        round: the plan's round; 0 if unknown.
        run: Flower's run id; 0 if unknown.
        phase: phase of the request that the message answers.
        form: how the content can be read, in a word or two: "open", "masked", "sealed shares" and the like.
        note: a refusal's reason, or the like.
        items: everything in the message.
    """

    plan: Annotated[str, Field(pattern=r"^([0-9a-f]{64})?$")] = ""
    session: Annotated[str, Field(pattern=r"^([0-9a-f]{32})?$")] = ""
    round: Annotated[int, Field(ge=0, lt=2**53)] = 0
    run: RunId = 0
    phase: str
    kind: Literal["reply", "refusal", "error", "clear"]
    form: Annotated[str, Field(max_length=40)]
    note: Annotated[str, Field(max_length=2000)] = ""
    items: tuple[Item, ...] = ()

    @property
    def bytes(self) -> int:
        """Total bytes of all items."""
        return sum(item.bytes for item in self.items)


class Line(LegibleFrozen):
    """One line of the ledger.

    Args:
        number: counted from 1.
        time: UTC, in the form 2026-01-31T12:00:00Z. Clocks can be set back, so times can decrease.
        silo: name of the ledger's silo.
        previous: digest of the previous line; zeros for the first.
    """

    number: Annotated[int, Field(ge=1, lt=2**53)]
    time: Annotated[str, Field(pattern=r"^[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}Z$")]
    silo: str
    previous: Sha256
    entry: Entry

    def serialised(self) -> bytes:
        """Return the line's bytes in the file, with its newline."""
        return canonical_json(self.model_dump(mode="json")) + b"\n"

    @property
    def digest(self) -> str:
        """SHA-256 of the line without its newline."""
        return digest(self.serialised())


@dataclass(frozen=True)
class Head:
    """The end of a ledger.

    Args:
        number: number of the last line; 0 if there is none.
        digest: digest of the last line; zeros if there is none. It commits to all lines up to it.
        bytes: total bytes of all items of all lines.
        first: time of the first line, or empty.
        last: time of the last line, or empty.
    """

    number: int = 0
    digest: str = NO_LINE
    bytes: int = 0
    first: str = ""
    last: str = ""

    def after(self, line: Line) -> Head:
        """Return the end of the ledger after one more line."""
        bytes_ = self.bytes + line.entry.bytes
        return Head(line.number, line.digest, bytes_, self.first or line.time, line.time)


class Mark(LegibleFrozen):
    """A line's number and digest: the content of `ledger.head`, and what the next line must follow."""

    number: Count = 0
    digest: Sha256 = NO_LINE


@dataclass(frozen=True)
class ReadLine:
    """A parsed line, and its position in the file."""

    position: int
    line: Line
    digest: str

    @property
    def mark(self) -> Mark:
        """The line's number and digest."""
        return Mark(number=self.line.number, digest=self.digest)

    def follows(self, mark: Mark) -> bool:
        """Return whether this line directly follows another."""
        return self.line.number == mark.number + 1 and self.line.previous == mark.digest


def parse(raw: bytes, silo: str) -> Line:
    """Parse a line; raise ValueError that describes what is wrong with it."""
    try:
        check_size(raw, HEADER_CHARACTERS)
        line = Line.model_validate_json(raw[:-1])
    except ValidationError as error:
        problem = error.errors(include_url=False, include_input=False)[0]
        if problem["type"] == "json_invalid":
            raise ValueError("is not JSON") from None
        key = ".".join(str(part) for part in problem["loc"]) or "it"
        raise ValueError(one_line(f"is not a line of a ledger: {key}: {problem['msg']}", 1000)) from None
    if line.serialised() != raw:
        raise ValueError("was changed: it is not in canonical form")
    if line.silo != silo:
        raise ValueError(f"belongs to silo {line.silo!r}, but this is the ledger of {silo!r}")
    return line


def digest(raw: bytes) -> str:
    """Return the SHA-256 of a line without its newline."""
    return hashlib.sha256(raw.removesuffix(b"\n")).hexdigest()
