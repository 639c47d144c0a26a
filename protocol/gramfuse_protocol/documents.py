"""Parses TOML into frozen pydantic models; errors name the file and the key."""

from __future__ import annotations

import difflib
import json
import re
import tomllib
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from pydantic import ConfigDict, ValidationError
from pydantic_core import ErrorDetails

from gramfuse_protocol.bounds import KEYS, LAYOUT_CHARACTERS, PLAN_CHARACTERS, VALUES
from gramfuse_protocol.errors import PlanError
from gramfuse_protocol.text import QUOTE_LIMIT, Legible, one_line, quoted

MOST_PROBLEMS = 20
"""Maximum number of problems that one error lists."""

PROBLEM_CHARACTERS = 1000
"""Maximum length of one problem's description."""

FILE_BYTES = 4 * LAYOUT_CHARACTERS
"""Maximum size of a text file: UTF-8 takes at most four bytes per character."""

KINDS = {
    "a plan": frozenset({"plan", "model", "task", "training", "merge", "privacy", "silo"}),
    "a silo file": frozenset({"name", "identity", "state", "data", "approved", "limits", "coordinator"}),
}
"""Keys by which a document of another kind is recognised."""

DOTS = 8
"""Maximum number of dots in a line of TOML, outside strings and comments: tomllib is quadratic in a key's parts."""

_QUOTED = re.compile(
    r'''"""(?:[^"\\]|\\.|"(?!""))*+(?:"{3,5})?+'''
    r"""|'''(?:[^']|'(?!''))*+(?:'{3,5})?+"""
    r"""|"(?:[^"\\\n]|\\.)*+"?+|'[^'\n]*+'?+|#[^\n]*+""",
    re.DOTALL,
)
"""A TOML string or comment; an unterminated one extends to the end of its line, or of the document."""


class Section(Legible):
    """A frozen table of a TOML file. Keys are kebab-case; unknown keys are refused; types are strict.

    All its text is printable (`gramfuse_protocol.text`).

    Attributes:
        kind: what a whole document of this type is called, as in KINDS; empty for a table.
    """

    kind: ClassVar[str] = ""

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
    """Return the text of a UTF-8 file; raises PlanError naming the file if it is missing, unreadable or too large."""
    try:
        with path.open("rb") as file:
            data = file.read(FILE_BYTES + 1)
        if len(data) > FILE_BYTES:
            raise PlanError(f"{path}: is larger than {FILE_BYTES:,} bytes, the limit for plans, silo files and layouts")
        return data.decode("utf-8")
    except FileNotFoundError:
        raise PlanError(f"{path}: no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise PlanError(f"{path}: cannot be read: {error}") from None


def parse(model: type[T], text: str, source: str) -> T:
    """Parse a TOML document into `model`.

    Args:
        source: name of the document in errors, usually its path.

    Raises:
        PlanError: with one line for each problem: the key and what was expected.
    """
    try:
        document = parse_toml(text)
    except ValueError as error:
        raise PlanError(f"{source}: not valid TOML: {one_line(str(error), QUOTE_LIMIT)}") from None
    return build(model, document, source)


def parse_toml(text: str) -> dict[str, Any]:
    """Parse an untrusted TOML document.

    Raises:
        ValueError: if it is too large, nested too deeply, not TOML, or contains an overlong number.
    """
    if len(text) > PLAN_CHARACTERS:
        raise ValueError(f"it has {len(text):,} characters; the limit is {PLAN_CHARACTERS:,}")
    bare = _QUOTED.sub(lambda match: "\n" * match[0].count("\n"), text)
    for mark, most, noun in (("=", KEYS, "keys"), ("[", KEYS, "arrays and tables"), (",", VALUES // 2, "items")):
        if bare.count(mark) > most:
            raise ValueError(f"it has about {bare.count(mark):,} {noun}; the limit is {most:,}")
    for number, line in enumerate(bare.split("\n"), 1):
        if line.count(".") > DOTS:
            raise ValueError(f"line {number} has {line.count('.')} dots; a key has at most {DOTS + 1} parts")
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError:
        raise
    except ValueError:
        raise ValueError("it contains a number that is too long") from None
    except RecursionError:
        raise ValueError("arrays or tables are nested too deeply") from None


def build(model: type[T], document: dict[str, object], source: str) -> T:
    """Build `model` from a parsed document; raises PlanError as `parse` does."""
    try:
        # TOML has lists only. In strict mode pydantic converts a list to a tuple only when it parses JSON.
        # A TOML date or time becomes an object, which no key accepts.
        text = json.dumps(document, default=lambda value: {"not a JSON value": str(value)})
        return model.model_validate_json(text, by_alias=True, by_name=False)
    except ValidationError as error:
        if kind := _other_kind(model, document):
            raise PlanError(f"{source}: looks like {kind}, not {model.kind}; name {model.kind}") from None
        problems = [p for p in error.errors(include_url=False) if not (p["type"] == "too_short" and p["input"])]
        lines = [explain(p, _suggestion(model, p["loc"])) for p in problems[:MOST_PROBLEMS]]
        if problems[MOST_PROBLEMS:]:
            lines.append(f"{len(problems) - MOST_PROBLEMS:,} more problems")
        raise PlanError("\n".join(f"{source}: {line}" for line in lines)) from None
    except ValueError:  # a hexadecimal TOML number may have more decimal digits than Python converts
        raise PlanError(f"{source}: contains a number that is too long") from None
    except RecursionError:
        raise PlanError(f"{source}: is nested too deeply") from None


def explain(problem: ErrorDetails, known_keys: str = "") -> str:
    """Describe one validation error in a line.

    Args:
        known_keys: text to append if the key is unknown.
    """
    key = ".".join(str(part) for part in problem["loc"]) or "the document"
    match problem["type"]:
        case "extra_forbidden":
            return f"unknown key {quoted(key)}{known_keys}"
        case "missing":
            return f"{quoted(key)} is missing"
        case "value_error" | "assertion_error":
            why = one_line(str(problem["ctx"]["error"]), PROBLEM_CHARACTERS)
            return f"{quoted(key)}: {why}" if problem["loc"] else why
        case _:
            return f"{quoted(key)}: {problem['msg']} (got {quoted(problem['input'])})"


def _other_kind(model: type[Section], document: dict[str, object]) -> str | None:
    """Return what a document is instead, if most of its keys are those of another kind."""
    if not model.kind:
        return None
    matches = {kind: len(keys & document.keys()) for kind, keys in KINDS.items()}
    likeliest = max(matches, key=lambda kind: matches[kind])
    return likeliest if matches[likeliest] > max(1, matches[model.kind]) else None


def _suggestion(model: type[Section], path: tuple[int | str, ...]) -> str:
    """Return the key that an unknown one resembles, else all keys that are known in its place."""
    if not path:
        return ""
    known = _known_keys(model, path[:-1])
    close = difflib.get_close_matches(str(path[-1]), known, n=1)
    return f"; did you mean {close[0]!r}?" if close else f"; known here: {', '.join(known)}"


def _known_keys(model: type[Section], path: tuple[object, ...]) -> list[str]:
    section: type[Section] = model
    for part in path:
        if isinstance(part, int):
            continue
        for field in section.model_fields.values():
            if field.alias == part:
                sections = [a for a in (field.annotation, *getattr(field.annotation, "__args__", ())) if _is_section(a)]
                if sections:
                    section = sections[0]
    return [str(field.alias) for field in section.model_fields.values()]


def _is_section(annotation: object) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, Section)
