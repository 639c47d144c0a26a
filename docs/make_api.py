"""Makes docs/api.md from the docstrings of the public names: `make api`."""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from typing import Any

import gramfuse

SECTIONS = {
    "Prepare: once, from the base model": ("derive_layout", "Layout", "Merge", "trainable"),
    "At a silo": ("collect_statistics", "Statistics"),
    "Merge": ("merge", "Merged", "add_differences"),
    "In a Flower app": ("statistics_record", "RegMean"),
    "Statistics as files": (
        *(
            "write_statistics",
            "read_statistics",
            "StatisticsFile",
            "About",
            "AddedTokens",
            "Added",
            "FrozenOfAdapter",
            "AdapterOfFile",
            "Origin",
            "Task",
        ),
    ),
    "Digests of a base model": ("tensor_digests", "config_digest", "processor_digest"),
    "Errors": ("GramfuseError", "PlanError", "ModelError", "ContributionError", "RunDirectoryError"),
}

SETUP = """\
import gramfuse
import numpy as np
import torch
from tokenizers import Tokenizer, models
from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast

tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"[UNK]": 0}, unk_token="[UNK]")))
sizes = {"vocab_size": 10, "hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
base = BertForSequenceClassification(BertConfig(**sizes)).eval()
batch = {
    "input_ids": torch.tensor([[1, 7, 5, 9, 2], [1, 8, 6, 2, 0]]),
    "attention_mask": torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 1, 0]]),
}
layout = gramfuse.derive_layout(base, batch)
start = gramfuse.trainable(base)
tuned = BertForSequenceClassification(base.config)  # for a model that a silo fine-tuned
"""

HEAD = f"""# The Python API

For those who have their own training loop, their own Flower apps, or no Flower at all. `import gramfuse` has all public
names; other modules may change at any time. Made from the docstrings by `make api`; do not edit.

* [examples/merge_two_checkpoints.py](../examples/merge_two_checkpoints.py): two Hugging Face models become one.
* Statistics as files: [statistics-format.md](statistics-format.md). Errors and their exit codes:
  [exit-codes](exit-codes/README.md).

The layout and the start come from the base model before it is fine-tuned. All who merge must use the same base model,
head included; where heads began differently, set the base's head to zero everywhere.

The examples below go on from these lines:

```python
{SETUP}```
"""

SECTION = re.compile(r"^(Example|Args|Returns|Raises|Attributes|Source):\s*(.*)$")


def document() -> str:
    """Return the whole page."""
    lines = [HEAD]
    for section, names in SECTIONS.items():
        lines.append(f"## {section}\n")
        for name in names:
            lines += _entry(name, getattr(gramfuse, name))
    return "\n".join(lines)


def _entry(name: str, thing: Any) -> list[str]:
    lines = [f"### {name}\n", "```text", _signature(name, thing), "```\n", *_text(inspect.getdoc(thing) or "")]
    if inspect.isclass(thing):
        inherited = {key for parent in thing.__mro__[1:] for key in vars(parent)}
        for key, member in vars(thing).items():
            if not key.startswith("_") and key not in inherited and inspect.isfunction(member):
                lines += [
                    "```text",
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
    annotation = signature.return_annotation
    returned = (
        "" if inspect.isclass(thing) or annotation in (None, inspect.Signature.empty) else f" -> {_type(annotation)}"
    )
    line = f"{name}({', '.join(parameters)}){returned}"
    if len(line) <= 110:
        return line
    return f"{name}(\n" + "".join(f"    {parameter},\n" for parameter in parameters) + f"){returned}"


def _type(annotation: Any) -> str:
    return annotation if isinstance(annotation, str) else getattr(annotation, "__name__", str(annotation))


def _text(docstring: str) -> list[str]:
    """Return a docstring as Markdown: an example becomes code, what stands under Args and its like a list."""
    lines: list[str] = []
    section = ""
    for line in [*docstring.splitlines(), ""]:
        if section == "Example" and not line.strip():
            lines += ["```", ""]
            section = ""
            continue
        heading = SECTION.match(line)
        if heading:
            section = heading[1]
            lines += ["```pycon"] if section == "Example" else [f"**{section}** {heading[2]}".strip(), ""]
        elif section == "Example":
            lines.append(line.removeprefix("    "))
        elif section and line.startswith("    ") and not line.startswith("     "):
            name, colon, rest = line.strip().partition(": ")
            lines.append(f"* `{name}`: {rest}" if colon and section != "Returns" else line.strip())
        elif section and line.strip():
            lines.append(f"  {line.strip()}")
        else:
            section = section if not line.strip() else ""
            lines.append(line)
    return lines


if __name__ == "__main__":
    Path(__file__).with_name("api.md").write_text(document(), encoding="utf-8")
