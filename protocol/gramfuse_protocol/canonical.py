"""Canonical JSON: one byte string for each document, for digests and headers.

The form is RFC 8785 (JSON Canonicalization Scheme) with one restriction that makes it easy to implement in any
language: no JSON floats. A float is a string with the shortest decimal that parses to the same float64 (for instance
"5e-05" or "0.9").
"""

from __future__ import annotations

import hashlib
import json
import math
from typing import Any


def canonical_json(document: Any) -> bytes:
    """Return the canonical UTF-8 form of a document of dicts, lists, strings, ints, floats, bools and None.

    Args:
        document: keys must be strings; integers must lie within ±(2^53 - 1); floats must be finite.

    Raises:
        ValueError: if a value has no canonical form.
    """
    return json.dumps(_ordered(document), ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode("utf-8")


def digest(document: Any) -> str:
    """Return the SHA-256 of the canonical form, as 64 lower-case hexadecimal digits."""
    return hashlib.sha256(canonical_json(document)).hexdigest()


def text_digest(text: str) -> str:
    """Return `digest` of the document whose canonical form is `text`, without parsing it.

    Raises:
        ValueError: if the text cannot be encoded as UTF-8.
    """
    return hashlib.sha256(text.encode("utf-8")).hexdigest()


def _ordered(value: Any) -> Any:
    if value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, int):
        if abs(value) >= 2**53:
            raise ValueError(f"{value} is beyond ±(2^53 - 1) and has no canonical form")
        return value
    if isinstance(value, float):
        if not math.isfinite(value):
            raise ValueError(f"{value} has no canonical form")
        return float.__repr__(value)
    if isinstance(value, list | tuple):
        return [_ordered(item) for item in value]
    if isinstance(value, dict):
        if not all(isinstance(key, str) for key in value):
            raise ValueError("a key is not a string, so the document has no canonical form")
        # RFC 8785, section 3.2.3, sorts by UTF-16 code units; their big-endian bytes sort the same way.
        return {key: _ordered(value[key]) for key in sorted(value, key=lambda k: k.encode("utf-16-be"))}
    raise ValueError(f"a {type(value).__name__} has no canonical form")
