"""Makes docs/api.md from the docstrings of the public names: `make api`."""

from __future__ import annotations

import inspect
import re
from importlib import import_module
from pathlib import Path
from typing import Any

PUBLIC = {
    "gramfuse_client": ("collect_statistics", "statistics_record", "write_statistics"),
    "gramfuse_server": ("merge", "Merged", "add_differences", "read_statistics", "RegMean"),
    "gramfuse_model.tracing": ("derive_layout",),
    "gramfuse_model.base": ("trainable",),
    "gramfuse_model.digests": ("tensor_digests", "config_digest", "processor_digest"),
    "gramfuse_protocol.statistics": ("Statistics",),
    "gramfuse_protocol.statistics_file": ("StatisticsFile", "About", "Added", "AddedTokens", "Origin"),
}

HEAD = """# The Python API

For those who have their own training loop, their own Flower apps, or no Flower at all. Made from the docstrings by
`make api`; do not edit.

* [examples/merge_two_checkpoints.py](../examples/merge_two_checkpoints.py): two Hugging Face models become one.
* Statistics as files: [statistics-format.md](statistics-format.md). Errors and their exit codes:
  [exit-codes](exit-codes/README.md).

`layout` and `base` come from the base model before it is fine-tuned: `derive_layout(model, batch)` and
`trainable(model)`. All who merge must use the same base model, head included; where heads began differently, set the
base's head to zero everywhere.
"""

SECTION = re.compile(r"^(Args|Returns|Raises|Attributes|Source):\s*(.*)$")


def document() -> str:
    """Return the whole page."""
    lines = [HEAD]
    for module, names in PUBLIC.items():
        lines.append(f"## {module}\n")
        for name in names:
            lines += _entry(name, getattr(import_module(module), name))
    return "\n".join(lines)


def _entry(name: str, thing: Any) -> list[str]:
    lines = [f"### {name}\n", "```python", _signature(name, thing), "```\n", *_text(inspect.getdoc(thing) or "")]
    if inspect.isclass(thing):
        inherited = {key for parent in thing.__mro__[1:] for key in vars(parent)}
        for key, member in vars(thing).items():
            if not key.startswith("_") and key not in inherited and inspect.isfunction(member):
                lines += [
                    "```python",
                    _signature(f"{name}.{key}", member),
                    "```\n",
                    *_text(inspect.getdoc(member) or ""),
                ]
    return lines


def _signature(name: str, thing: Any) -> str:
    """Return a call as it is written, on one line if there is room."""
    signature = inspect.signature(thing)
    written = inspect.get_annotations(thing) if inspect.isclass(thing) else {}  # pydantic would spell them out
    parameters, starred = [], False
    for parameter in signature.parameters.values():
        if parameter.name == "self":
            continue
        if parameter.kind is parameter.KEYWORD_ONLY and not starred:
            parameters.append("*")
            starred = True
        stars = {parameter.VAR_POSITIONAL: "*", parameter.VAR_KEYWORD: "**"}.get(parameter.kind, "")
        default = "" if parameter.default is parameter.empty else f" = {parameter.default!r}"
        parameters.append(
            f"{stars}{parameter.name}: {_type(written.get(parameter.name, parameter.annotation))}{default}"
        )
    given = signature.return_annotation
    returned = "" if inspect.isclass(thing) or given in (None, inspect.Signature.empty) else f" -> {_type(given)}"
    line = f"{name}({', '.join(parameters)}){returned}"
    if len(line) <= 110:
        return line
    return f"{name}(\n" + "".join(f"    {parameter},\n" for parameter in parameters) + f"){returned}"


def _type(annotation: Any) -> str:
    return annotation if isinstance(annotation, str) else getattr(annotation, "__name__", str(annotation))


def _text(docstring: str) -> list[str]:
    """Return a docstring as Markdown: what stands under Args and its like becomes a list."""
    lines: list[str] = []
    section = ""
    for line in docstring.splitlines():
        heading = SECTION.match(line)
        if heading:
            section = heading[1]
            lines += [f"**{section}** {heading[2]}".strip(), ""]
        elif section and line.startswith("    ") and not line.startswith("     "):
            name, colon, rest = line.strip().partition(": ")
            lines.append(f"* `{name}`: {rest}" if colon and section != "Returns" else line.strip())
        elif section and line.strip():
            lines.append(f"  {line.strip()}")
        else:
            section = section if not line.strip() else ""
            lines.append(line)
    return [*lines, ""]


if __name__ == "__main__":
    Path(__file__).with_name("api.md").write_text(document(), encoding="utf-8")
