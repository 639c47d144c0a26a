"""Reading TOML into frozen models, with errors that name the file and the key."""

from __future__ import annotations

import json
import re
import tomllib
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ConfigDict, ValidationError
from pydantic_core import ErrorDetails

from gramfuse_protocol.bounds import KEYS, LAYOUT_CHARACTERS, PLAN_CHARACTERS, VALUES
from gramfuse_protocol.errors import PlanError
from gramfuse_protocol.text import SAID, Legible, one_line, quoted

MOST_PROBLEMS = 20
"""Most problems of one document that an error lists."""

MOST = 1000
"""Most characters of what one is."""

FILE_BYTES = 4 * LAYOUT_CHARACTERS
"""Most that is read of a text file: UTF-8 has at most four bytes for a character."""

DOTS = 8
"""Most dots in one line of TOML, but for those in texts and comments: tomllib takes the square of a key's parts."""

_QUOTED = re.compile(
    r'''"""(?:[^"\\]|\\.|"(?!""))*+(?:"{3,5})?+'''
    r"""|'''(?:[^']|'(?!''))*+(?:'{3,5})?+"""
    r"""|"(?:[^"\\\n]|\\.)*+"?+|'[^'\n]*+'?+|#[^\n]*+""",
    re.DOTALL,
)
"""A text or a comment of TOML; one that does not end goes on to the end of its line, or of the document."""


class Section(Legible):
    """A frozen table of a TOML file. Keys are kebab-case; unknown keys are refused; types are strict.

    All its text is printable (`gramfuse_protocol.text`).
    """

    model_config = ConfigDict(
        frozen=True,
        strict=True,
        extra="forbid",
        alias_generator=lambda name: name.replace("_", "-"),
        validate_by_name=True,
        allow_inf_nan=False,
    )


T = TypeVar("T", bound=Section)


def read_text(path: Path) -> str:
    """Return the text of a UTF-8 file, or raise PlanError naming it if there is none, or it is too large."""
    try:
        with path.open("rb") as file:
            data = file.read(FILE_BYTES + 1)
        if len(data) > FILE_BYTES:
            raise PlanError(f"{path}: has more than {FILE_BYTES:,} bytes, which none of gramfuse's documents has")
        return data.decode("utf-8")
    except FileNotFoundError:
        raise PlanError(f"{path}: no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise PlanError(f"{path}: cannot be read: {error}") from None


def parse(model: type[T], text: str, source: str) -> T:
    """Parse a TOML document into `model`.

    Args:
        source: what to call the document in errors, usually its path.

    Raises:
        PlanError: one line per problem, each with the key and what was expected.
    """
    try:
        document = parse_toml(text)
    except ValueError as error:
        raise PlanError(f"{source}: not valid TOML: {one_line(str(error), SAID)}") from None
    return build(model, document, source)


def parse_toml(text: str) -> dict[str, Any]:
    """Parse a TOML document that somebody else wrote.

    Raises:
        ValueError: if it is too large, nested too deep, no TOML, or holds a number that is too long to be one.
    """
    if len(text) > PLAN_CHARACTERS:
        raise ValueError(f"it has {len(text):,} characters, more than the {PLAN_CHARACTERS:,} that it may have")
    bare = _QUOTED.sub(lambda found: "\n" * found[0].count("\n"), text)
    for mark, most, what in (("=", KEYS, "keys"), ("[", KEYS, "arrays and tables"), (",", VALUES // 2, "items")):
        if bare.count(mark) > most:
            raise ValueError(f"about {bare.count(mark):,} {what} are more than the {most:,} that it may have")
    for number, line in enumerate(bare.split("\n"), 1):
        if line.count(".") > DOTS:
            raise ValueError(f"line {number} has {line.count('.')} dots; a key has a few parts")
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError:
        raise
    except ValueError:
        raise ValueError("it holds a number that is too long to be one") from None
    except RecursionError:
        raise ValueError("arrays or tables are nested too deep") from None


def build(model: type[T], document: dict[str, object], source: str) -> T:
    """Build `model` from a parsed document; errors as `parse`."""
    try:
        # JSON mode is where strict pydantic still takes a list for a tuple, which is all that TOML has.
        # A date or time of TOML becomes an object, which no key takes.
        text = json.dumps(document, default=lambda value: {"not a JSON value": str(value)})
        return model.model_validate_json(text, by_alias=True, by_name=False)
    except ValidationError as error:
        problems = [p for p in error.errors(include_url=False) if not (p["type"] == "too_short" and p["input"])]
        lines = [
            explain(p, f"; known here: {', '.join(_known(model, p['loc'][:-1]))}") for p in problems[:MOST_PROBLEMS]
        ]
        if problems[MOST_PROBLEMS:]:
            lines.append(f"{len(problems) - MOST_PROBLEMS:,} more problems")
        raise PlanError("\n".join(f"{source}: {line}" for line in lines)) from None
    except ValueError:  # TOML has hexadecimal numbers of any length, and JSON has none
        raise PlanError(f"{source}: holds a number that is too long to be one") from None
    except RecursionError:
        raise PlanError(f"{source}: is nested too deep") from None


def explain(problem: ErrorDetails, known: str = "") -> str:
    """Say what is wrong with one key of a document.

    Args:
        known: what to add of the keys that are known, if it is another.
    """
    key = ".".join(str(part) for part in problem["loc"]) or "the document"
    match problem["type"]:
        case "extra_forbidden":
            return f"unknown key {quoted(key)}{known}"
        case "missing":
            return f"{quoted(key)} is missing"
        case "value_error" | "assertion_error":
            why = one_line(str(problem["ctx"]["error"]), MOST)
            return f"{quoted(key)}: {why}" if problem["loc"] else why
        case _:
            return f"{quoted(key)}: {problem['msg']} (got {quoted(problem['input'])})"


def _known(model: type[Section], path: tuple[object, ...]) -> list[str]:
    section: type[Section] = model
    for part in path:
        if isinstance(part, int):
            continue
        for field in section.model_fields.values():
            if field.alias == part:
                inner = [a for a in (field.annotation, *getattr(field.annotation, "__args__", ())) if _is_section(a)]
                if inner:
                    section = inner[0]
    return [str(field.alias) for field in section.model_fields.values()]


def _is_section(annotation: object) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, Section)
