"""The lines of an egress ledger: what each holds, how it is written, and how it is read."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import BeforeValidator, ConfigDict, Field, PlainSerializer, ValidationError, ValidationInfo

from gramfuse_protocol.bounds import HEADER_CHARACTERS, check_size
from gramfuse_protocol.canonical import canonical_json
from gramfuse_protocol.text import Legible, one_line

NO_LINE = "0" * 64


def _from_text(value: object, info: ValidationInfo) -> object:
    return int(value) if info.mode == "json" and isinstance(value, str) and value.isascii() else value


Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]

Count = Annotated[int, Field(ge=0, lt=2**53)]

# Flower's run ids have 64 bits, more than canonical JSON has for a number, so they are written as text.
RunId = Annotated[int, Field(ge=0, lt=2**64), BeforeValidator(_from_text), PlainSerializer(str, when_used="json")]


class _Frozen(Legible):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, hide_input_in_errors=True)


class Item(_Frozen):
    """One array or value that left.

    Args:
        dtype: numpy's name; "json" or "text" for what is no array, which has the shape ().
        bytes: how many.
        sha256: digest of those bytes.
    """

    name: str
    dtype: str
    shape: tuple[Count, ...]
    bytes: Count
    sha256: Sha256


class Entry(_Frozen):
    """What is recorded about one message, or, of kind "clear", about what the silo's owner cleared.

    Args:
        plan: digest of the plan; empty if it is not known.
        session: nonce of the session; empty if it is not known.
        round: of the plan; 0 if it is not known.
        run: Flower's run id; 0 if it is not known.
        phase: of the request that the message answers.
        form: in a word, how the content can be read: "open", "masked", "sealed" and the like.
        note: a refusal's reason, or the like.
        items: all that the message carries.
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
        """How many bytes all items have together."""
        return sum(item.bytes for item in self.items)


class Line(_Frozen):
    """One line of the ledger.

    Args:
        number: 1 for the first.
        time: UTC, as 2026-01-31T12:00:00Z. Clocks may be set back, so times may go down.
        silo: the name of the silo whose ledger it is.
        previous: digest of the line before it; zeros for the first.
    """

    number: Annotated[int, Field(ge=1, lt=2**53)]
    time: Annotated[str, Field(pattern=r"^[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}Z$")]
    silo: str
    previous: Sha256
    entry: Entry

    def serialised(self) -> bytes:
        """Return the line as it stands in the file, with its newline."""
        return canonical_json(self.model_dump(mode="json")) + b"\n"

    @property
    def digest(self) -> str:
        """SHA-256 of the line without its newline."""
        return digest(self.serialised())


@dataclass(frozen=True)
class Head:
    """Where a ledger ends.

    Args:
        number: of the last line; 0 if there is none.
        digest: of the last line; zeros if there is none. Noted elsewhere, it holds all lines up to it.
        bytes: of all items of all lines.
        first: time of the first line, or empty.
        last: time of the last line, or empty.
    """

    number: int = 0
    digest: str = NO_LINE
    bytes: int = 0
    first: str = ""
    last: str = ""

    def after(self, line: Line) -> Head:
        """Return where the ledger ends with one more line."""
        bytes_ = self.bytes + line.entry.bytes
        return Head(line.number, line.digest, bytes_, self.first or line.time, line.time)


class Mark(_Frozen):
    """A line by number and digest: what `ledger.head` holds, and what the next line has to follow."""

    number: Count = 0
    digest: Sha256 = NO_LINE


@dataclass(frozen=True)
class ReadLine:
    """A line that was read, and where it stands."""

    position: int
    line: Line
    digest: str

    @property
    def mark(self) -> Mark:
        """The line by number and digest."""
        return Mark(number=self.line.number, digest=self.digest)

    def follows(self, mark: Mark) -> bool:
        """Whether it is the line after another."""
        return self.line.number == mark.number + 1 and self.line.previous == mark.digest


def parse(raw: bytes, silo: str) -> Line:
    """Return a line, or raise ValueError with what is wrong with it."""
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
        raise ValueError(f"is of the silo {line.silo!r}, and this is the ledger of {silo!r}")
    return line


def digest(raw: bytes) -> str:
    """Return the SHA-256 of a line without its newline."""
    return hashlib.sha256(raw.removesuffix(b"\n")).hexdigest()
