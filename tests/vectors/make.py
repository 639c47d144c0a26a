"""Makes the test vectors beside it from this implementation, the same bytes every time.

    python tests/vectors/make.py            write them
    python tests/vectors/make.py --check    exit 1 if what is there differs

* secure_sum.json: whole sessions, the first with every value in between.
* parts.json: small vectors of each part.
* refused.json: what must be refused, and with which error.

Byte strings are hexadecimal; words are eight little-endian bytes each, one after the other. Whatever random bytes a
silo consumed stand in the vector, so replaying one takes no generator.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.vectors.made.parts import parts
from tests.vectors.made.refused import refused
from tests.vectors.made.sessions import sessions

HERE = Path(__file__).parent


def documents() -> dict[str, str]:
    good = sessions()
    files = {"secure_sum.json": {"sessions": good}, "parts.json": parts(), "refused.json": {"refused": refused(good)}}
    return {name: _text(document) + "\n" for name, document in files.items()}


def _text(value: Any, indent: int = 0) -> str:
    """JSON of which whatever fits on one line stands on one line."""
    flat = json.dumps(value, ensure_ascii=True)
    if not isinstance(value, dict | list) or len(flat) + indent <= 110:
        return flat
    start = "\n" + " " * (indent + 1)
    if isinstance(value, dict):
        lines = [f"{json.dumps(key)}: {_text(item, indent + 1)}" for key, item in value.items()]
        return "{" + start + f",{start}".join(lines) + "\n" + " " * indent + "}"
    return "[" + start + f",{start}".join(_text(item, indent + 1) for item in value) + "\n" + " " * indent + "]"


def main(arguments: Sequence[str]) -> int:
    differ = []
    for name, text in documents().items():
        path = HERE / name
        if "--check" in arguments:
            if not path.exists() or path.read_bytes() != text.encode("ascii"):
                differ.append(name)
        else:
            path.write_bytes(text.encode("ascii"))
    for name in differ:
        print(f"{name} is not what make.py makes", file=sys.stderr)
    return 1 if differ else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
