"""Which text is taken, and how foreign text is shown."""

from __future__ import annotations

import importlib
import pkgutil
import unicodedata
from collections.abc import Iterator

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from pydantic import BaseModel, ValidationError

import gramfuse_client
import gramfuse_protocol
import gramfuse_server
from gramfuse_protocol.contract.task import Task
from gramfuse_protocol.messages.phases import REPLIES, REQUESTS
from gramfuse_protocol.text import Legible, lines_of, one_line, printable, quoted

ANYTHING = st.text(st.characters(exclude_categories=[]))
OWN = {
    "gramfuse_protocol.frozen",
    "gramfuse_protocol.secure_sum.member",
    "gramfuse_client.state.attempts",
    "gramfuse_client.state.measurements",
    "gramfuse_client.guard.releases",
    "gramfuse_client.state.session",
    "gramfuse_client.state.state",
    "gramfuse_server.report.part",
    "gramfuse_server.report.choices",
    "gramfuse_server.report.schema",
}
"""Modules whose models a side writes for itself, of digests, numbers and names that were checked.

A report also holds what others said, which terminal and page escape when they show it (tests/server/test_page.py).
"""


@pytest.mark.parametrize(
    "label",
    [
        "é",
        "e\u0301",
        "漢字",
        "हिन्दी",
        "ภาษาไทย",
        "שָׁלוֹם",
        "العربية",
        "Ελληνικά",
        "❤️",
        "👍🏽",
        "🇩🇪",
        "1️⃣",
        "a b",
        "[bold]",
        "x\\n",
        "∑ ≤ 3",
    ],
)
def test_letters_of_all_scripts_and_emoji_are_labels(label: str) -> None:
    assert printable(label)
    assert one_line(label) == label
    assert Task(task="classification", labels=(label, "other")).labels[0] == label


@pytest.mark.parametrize(
    "text",
    [
        *(chr(code) for code in (*range(0x20), *range(0x7F, 0xA0))),
        *"\xa0\xad\u034f\u061c\u115f\u180e\u2000\u2028\u2029\u202f\u2060\u2064\u2800\u3000\u3164\ufeff\uffa0\ufff9",
        *(chr(code) for code in (*range(0x200B, 0x2010), *range(0x202A, 0x202F), *range(0x2066, 0x2070))),
        *"\ud800\udfff\ue000\ufdd0\uffff\U000e0001\U000e0041\U0010ffff",
        "\u0301",
        "\ufe0f",
        "\u20dd",
    ],
    ids=lambda text: f"U+{ord(text):04X}",
)
def test_what_a_reader_does_not_see_is_no_label(text: str) -> None:
    whole = text if unicodedata.category(text)[0] == "M" else f"a{text}b"
    assert not printable(whole)
    shown = one_line(whole)
    assert text not in shown
    assert shown.isprintable()
    with pytest.raises(ValidationError):
        Task(task="classification", labels=(whole, "other"))


def test_a_flood_of_marks_does_not_run_into_other_lines() -> None:
    shown = one_line("a" + "\u0336" * 5000)
    assert shown.count("\u0336") == 4
    assert not printable("a" + "\u0336" * 5)


@given(text=ANYTHING)
@example("a\r\n\x1b[2J\u202e\ud800\x9b")
def test_any_text_is_shown_on_one_line_that_is_shown_the_same_again(text: str) -> None:
    shown = one_line(text)
    assert printable(shown)
    assert one_line(shown) == shown
    assert (shown == text) is printable(text)
    assert lines_of(text).count("\n") == text.count("\n")


@given(text=ANYTHING, limit=st.integers(40, 80))
@example("x" * 10_000, 40)
@example("\u202e" * 50, 80)
def test_a_longer_text_is_cut_where_a_reader_sees_it(text: str, limit: int) -> None:
    shown = one_line(text, limit)
    assert len(shown) <= limit
    assert printable(shown)
    assert len(quoted(text, limit)) <= limit
    assert (shown != one_line(text)) is shown.endswith(" more characters)") or len(one_line(text)) <= limit


def models() -> Iterator[type[BaseModel]]:
    """Yield all pydantic models of the packages."""
    for package in (gramfuse_protocol, gramfuse_client, gramfuse_server):
        for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            importlib.import_module(module.name)
    found: list[type[BaseModel]] = [BaseModel]
    while found:
        kinds = found.pop().__subclasses__()
        found += kinds
        yield from (kind for kind in kinds if kind.__module__.startswith("gramfuse_"))


def test_every_model_that_others_fill_has_printable_text_only() -> None:
    kinds = set(models())
    assert len(kinds) > 50
    assert {kind for kind in kinds if not issubclass(kind, Legible) and kind.__module__ not in OWN} == set()
    assert all(issubclass(kind, Legible) for kind in (*REQUESTS.values(), *REPLIES.values()))


def test_text_is_found_wherever_a_field_has_it() -> None:
    class Deep(Legible):
        documents = frozenset({"document"})

        a: str = ""
        b: tuple[tuple[str, int], ...] = ()
        c: dict[str, dict[str, list[str]]] | None = None
        document: str = ""

    class Deeper(Deep):
        more: tuple[Deep, ...] = ()
        d: str | int = 0

    bad = "x\x1b[8m"
    fields: tuple[dict[str, object], ...] = (
        {"a": bad},
        {"b": (("y", 1), (bad, 2))},
        {"c": {bad: {}}},
        {"c": {"y": {bad: []}}},
        {"c": {"y": {"z": ["w", bad]}}},
        {"document": f"one\n\ttwo {bad}"},
        {"document": "one\rtwo"},
        {"d": bad},
        {"more": ({"a": bad},)},
    )
    for given_ in fields:
        with pytest.raises(ValidationError, match=r"U\+00(1B|0D)"):
            Deeper.model_validate(given_)
    assert Deeper(document="one\n\ttwo\n", a="é", b=(("y", 1),), c={"y": {"z": ["w"]}}).document.endswith("\n")
