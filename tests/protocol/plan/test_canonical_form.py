"""The canonical form that digests are taken of."""

from __future__ import annotations

import enum
import hashlib
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gramfuse_protocol.canonical import canonical_json, digest
from tests.protocol.plan.canonical import canonical


def test_keys_are_sorted_by_utf16_code_units() -> None:
    # RFC 8785, section 3.2.3: U+1F602 comes before U+FB33, because its first unit is D83D.
    document = {
        "\u20ac": "Euro Sign",
        "\r": "Carriage Return",
        "\ufb33": "Hebrew Letter Dalet With Dagesh",
        "1": "One",
        "\U0001f602": "Smiley",
        "\u0080": "Control",
        "\u00f6": "Latin Small Letter O With Diaeresis",
    }
    assert canonical_json(document).decode() == (
        '{"\\r":"Carriage Return","1":"One","\u0080":"Control","\u00f6":"Latin Small Letter O With Diaeresis",'
        '"\u20ac":"Euro Sign","\U0001f602":"Smiley","\ufb33":"Hebrew Letter Dalet With Dagesh"}'
    )


def test_strings_are_escaped_as_rfc_8785_says_and_no_more() -> None:
    # RFC 8785, section 3.2.2.2, and the characters that other JSON writers like to escape.
    text = "\u20ac$\u000f\u000aA'\u0042\u0022\u005c\\\"/\b\t\f\r\x00\x1f\x7f\u2028<&\ufeff"
    expected = '"\u20ac$\\u000f\\nA\'B\\"\\\\\\\\\\"/\\b\\t\\f\\r\\u0000\\u001f\x7f\u2028<&\ufeff"'
    assert canonical_json(text) == expected.encode("utf-8")


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.9, "0.9"),
        (0.1 + 0.2, "0.30000000000000004"),
        (5e-5, "5e-05"),
        (0.0001, "0.0001"),
        (1.0, "1.0"),
        (0.0, "0.0"),
        (5e-324, "5e-324"),
        (1.7976931348623157e308, "1.7976931348623157e+308"),
        (9007199254740993.0, "9007199254740992.0"),
        (1e16, "1e+16"),
        (np.float64(0.9), "0.9"),
    ],
)
def test_a_float_is_a_string_of_its_shortest_decimal(value: float, text: str) -> None:
    assert canonical_json([value]) == f'["{text}"]'.encode()


def test_integers_up_to_2_to_the_53_are_written_and_larger_ones_refused() -> None:
    limit = 2**53 - 1
    assert canonical_json([limit, -limit, 0]) == b"[9007199254740991,-9007199254740991,0]"
    for value in (limit + 1, -limit - 1, 10**40):
        with pytest.raises(ValueError, match="no canonical form"):
            canonical_json({"deep": [value]})


class _Colour(enum.Enum):
    RED = 1


@pytest.mark.parametrize(
    "value",
    [
        math.nan,
        math.inf,
        -math.inf,
        {1: "a"},
        {None: 1},
        {"a"},
        b"bytes",
        1j,
        _Colour.RED,
        "\ud800",
        {"\udc00": 1},
    ],
    ids=repr,
)
def test_what_has_no_canonical_form_is_a_value_error(value: Any) -> None:
    with pytest.raises(ValueError, match=r"."):
        canonical_json([value])


def test_literals_and_nesting() -> None:
    document = {"b": [None, True, False, {}, []], "a": (1, "x")}
    assert canonical_json(document) == b'{"a":[1,"x"],"b":[null,true,false,{},[]]}'
    assert digest(document) == hashlib.sha256(b'{"a":[1,"x"],"b":[null,true,false,{},[]]}').hexdigest()


_TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
_FLOATS = st.floats(allow_nan=False, allow_infinity=False)
_SCALARS = st.none() | st.booleans() | _TEXT | st.integers(1 - 2**53, 2**53 - 1) | _FLOATS

_DOCUMENTS = st.recursive(
    _SCALARS, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(_TEXT, inner, max_size=4)
)


@given(_DOCUMENTS)
def test_any_document_has_the_form_that_an_independent_canonicaliser_gives(document: Any) -> None:
    assert canonical_json(document).decode("utf-8") == canonical(document)
