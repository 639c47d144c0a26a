"""Makes docs/report.md from the schema of report.json: `make api`."""

from __future__ import annotations

import types
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from gramfuse_server.report.part import ReportPart
from gramfuse_server.report.schema import OPTIONAL, REQUIRED, SCHEMA, Report

NAMES = {str: "text", int: "whole number", float: "number", bool: "true or false", types.NoneType: "null"}

HEAD = f"""# report.json, key by key

What a run, a merge of files or `gramfuse tune` leaves in `report.json`; its format is `{SCHEMA}`. Made from
the schema by `make api`; do not edit. A file with another key, or without one that it must have, is no report:
`gramfuse report` refuses it and names the key; so it does with a figure outside the range that this page gives. Numbers
may be `NaN` or `Infinity` where the range allows it, which Python reads and strict JSON does not have.

There are three kinds: of a run that is complete (*complete*), of one that failed (*failed*), and of a merge of
statistics files (*files*). The table says in which of them a key always is, and in brackets in which it may be.
"""


def document() -> str:
    """Return the whole page."""
    lines = [HEAD, "| key | value | in | what it is |", "|---|---|---|---|"]
    for _, key, what, description in _rows(Report):
        lines.append(f"| `{key}` | {what} | {_kinds(key)} | {description} |")
    parts = dict.fromkeys(_parts(Report))
    for part in parts:
        lines += ["", f"## {_title(part)}", "", f"{part.__doc__}", "", "| key | value | what it is |", "|---|---|---|"]
        for name, key, what, description in _rows(part):
            optional = "" if part.model_fields[name].is_required() else ", optional"
            lines.append(f"| `{key}` | {what}{optional} | {description} |")
    return "\n".join(lines) + "\n"


def _rows(part: type[ReportPart]) -> Iterator[tuple[str, str, str, str]]:
    """Yield the name, the key, the value and the description of each field."""
    for name, field in part.model_fields.items():
        description = " ".join((field.description or "").split()).replace("|", "\\|")
        yield name, field.alias or name, _value(field.annotation), description


def _kinds(key: str) -> str:
    always = [kind for kind, keys in REQUIRED.items() if key in keys]
    may = [f"({kind})" for kind, keys in OPTIONAL.items() if key in keys]
    return "all" if len(always) == len(REQUIRED) else ", ".join([*always, *may])


def _value(annotation: Any) -> str:
    """Say in words what JSON value a field has."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _value(arguments[0])
    if origin is Literal:
        return ", ".join(f"`{value}`" for value in arguments)
    if origin in (Union, types.UnionType):
        return " or ".join(_value(one) for one in arguments)
    if origin is tuple:
        if arguments[1:] == (...,):
            return f"list of {_value(arguments[0])}"
        return f"[{', '.join(_value(one) for one in arguments)}]"
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return f"{{name: {_value(arguments[1])}}}"
    if isinstance(annotation, type) and issubclass(annotation, ReportPart):
        return f"[{_title(annotation)}](#{_title(annotation).lower()})"
    return NAMES[annotation]


def _parts(annotation: Any) -> Iterator[type[ReportPart]]:
    """Yield the parts that a field, or a part, consists of, each before its own."""
    if isinstance(annotation, type) and issubclass(annotation, ReportPart):
        if annotation is not Report:
            yield annotation
        for field in annotation.model_fields.values():
            yield from _parts(field.annotation)
    else:
        for one in get_args(annotation):
            yield from _parts(one)


def _title(part: type[ReportPart]) -> str:
    return part.__name__.removesuffix("OfReport")


if __name__ == "__main__":
    Path(__file__).with_name("report.md").write_text(document(), encoding="utf-8")
