"""Whatever is done to a ledger's lines is found, and the error names the place or the line next to it."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from gramfuse_client.guard.ledger import Ledger
from gramfuse_client.guard.ledger_lines import NO_LINE, Entry, Item, Line
from gramfuse_protocol.errors import LedgerError
from gramfuse_protocol.text import printable

DIGESTS = st.text("0123456789abcdef", min_size=64, max_size=64)
PRINTABLE = st.characters(
    exclude_categories=["Cs", "Cc", "Cf", "Co", "Cn", "Zl", "Zp", "Zs", "Mn", "Me"], include_characters=" "
).filter(printable)
TEXTS = st.text(PRINTABLE, max_size=12)
SIZES = st.integers(0, 2**53 - 1)
TIMES = st.datetimes(datetime(1990, 1, 1), datetime(2100, 1, 1), timezones=st.just(UTC))

ITEMS = st.builds(
    Item,
    name=TEXTS,
    dtype=TEXTS,
    shape=st.lists(SIZES, max_size=3).map(tuple),
    bytes=SIZES,
    sha256=DIGESTS,
)
ENTRIES = st.builds(
    Entry,
    plan=st.just("") | DIGESTS,
    session=st.just("") | st.text("0123456789abcdef", min_size=32, max_size=32),
    run=st.integers(0, 2**64 - 1),
    phase=TEXTS,
    kind=st.sampled_from(["reply", "refusal", "error"]),
    form=TEXTS,
    note=TEXTS,
    items=st.lists(ITEMS, max_size=2).map(tuple),
)


LEDGERS = st.lists(ENTRIES, min_size=1, max_size=8)
# A line that was written when the silo was killed, before `ledger.head` named it.
UNNAMED = st.none() | ENTRIES

FEW = settings(max_examples=60, deadline=None, derandomize=True)


@contextmanager
def _written(entries: list[Entry], unnamed: Entry | None) -> Iterator[tuple[Ledger, list[bytes]]]:
    """Yield a ledger and its lines as they stand in the file."""
    with tempfile.TemporaryDirectory() as directory:
        ledger, head = Ledger(Path(directory, "ledger.jsonl"), "a"), Path(directory, "ledger.head")
        for n, entry in enumerate(entries):
            ledger.append(entry, datetime(2026, 1, 31, tzinfo=UTC) - timedelta(minutes=n))
        named = head.read_bytes()
        if unnamed:
            ledger.append(unnamed)
            head.write_bytes(named)
        assert [line.entry for line in ledger.lines()] == entries + ([unnamed] if unnamed else [])
        yield ledger, ledger.path.read_bytes().splitlines(keepends=True)


def _named_line(ledger: Ledger, damaged: list[bytes], intact: list[bytes]) -> int:
    """Return the line that the error about a damaged ledger names; what was yielded before it is as it was."""
    assert b"".join(damaged) != b"".join(intact)
    ledger.path.write_bytes(b"".join(damaged))
    yielded: list[bytes] = []
    with pytest.raises(LedgerError) as caught:
        yielded.extend(line.serialised() for line in ledger.lines())
    assert yielded == intact[: len(yielded)]
    found = re.search(r"ledger\.jsonl:(\d+): ", str(caught.value))
    assert found is not None
    return int(found[1])


@FEW
@given(entries=LEDGERS, unnamed=UNNAMED, data=st.data())
def test_a_change_of_any_byte_is_found(entries: list[Entry], unnamed: Entry | None, data: st.DataObject) -> None:
    with _written(entries, unnamed) as (ledger, raws):
        n = data.draw(st.integers(0, len(entries) - 1), label="line")
        changed = bytearray(raws[n])
        changed[data.draw(st.integers(0, len(changed) - 1), label="byte")] ^= data.draw(st.integers(1, 255))
        named = _named_line(ledger, [*raws[:n], bytes(changed), *raws[n + 1 :]], raws)
        assert abs(named - (n + 1)) <= 1


@FEW
@given(entries=LEDGERS, unnamed=UNNAMED, data=st.data())
def test_other_content_in_a_well_formed_line_is_found(
    entries: list[Entry], unnamed: Entry | None, data: st.DataObject
) -> None:
    with _written(entries, unnamed) as (ledger, raws):
        n = data.draw(st.integers(0, len(entries) - 1), label="line")
        entry = data.draw(ENTRIES.filter(lambda other: other != entries[n]))
        changed = Line.model_validate_json(raws[n]).model_copy(update={"entry": entry}).serialised()
        assert _named_line(ledger, [*raws[:n], changed, *raws[n + 1 :]], raws) in (n + 1, n + 2)


@FEW
@given(entries=LEDGERS, unnamed=UNNAMED, data=st.data())
def test_removed_lines_are_missed(entries: list[Entry], unnamed: Entry | None, data: st.DataObject) -> None:
    with _written(entries, unnamed) as (ledger, raws):
        first = data.draw(st.integers(0, len(entries) - 1), label="first")
        end = data.draw(st.integers(first + 1, len(entries)), label="end")
        named = _named_line(ledger, [*raws[:first], *raws[end:]], raws)
        assert abs(named - (first + 1)) <= 1


@FEW
@given(entries=LEDGERS, unnamed=UNNAMED, data=st.data())
def test_a_repeated_line_is_found(entries: list[Entry], unnamed: Entry | None, data: st.DataObject) -> None:
    with _written(entries, unnamed) as (ledger, raws):
        n = data.draw(st.integers(0, len(raws) - 1), label="line")
        to = data.draw(st.just(n + 1) | st.integers(0, len(raws)), label="to")
        named = _named_line(ledger, [*raws[:to], raws[n], *raws[to:]], raws)
        assert abs(named - (to + 1)) <= 1


@FEW
@given(entries=st.lists(ENTRIES, min_size=2, max_size=8), unnamed=UNNAMED, data=st.data())
def test_swapped_lines_are_found(entries: list[Entry], unnamed: Entry | None, data: st.DataObject) -> None:
    with _written(entries, unnamed) as (ledger, raws):
        i, j = data.draw(st.lists(st.integers(0, len(raws) - 1), min_size=2, max_size=2, unique=True), label="swap")
        swapped = list(raws)
        swapped[i], swapped[j] = raws[j], raws[i]
        named = _named_line(ledger, swapped, raws)
        assert min(abs(named - (i + 1)), abs(named - (j + 1))) <= 1


@FEW
@given(entries=LEDGERS, unnamed=UNNAMED, data=st.data())
def test_a_forged_line_is_found(entries: list[Entry], unnamed: Entry | None, data: st.DataObject) -> None:
    with _written(entries, unnamed) as (ledger, raws):
        at = data.draw(st.integers(0, len(raws)), label="at")
        digests = [NO_LINE, *(Line.model_validate_json(raw).digest for raw in raws)]
        number = data.draw(st.just(at + 1) | st.integers(1, len(raws) + 2) | st.integers(1, 2**53 - 1))
        previous = data.draw(st.just(digests[at]) | st.sampled_from(digests) | DIGESTS)
        # After the last line, one that fits is what a killed silo leaves: nobody who only sees the file could tell.
        assume(not (at == len(raws) and not unnamed and number == at + 1 and previous == digests[at]))
        time = data.draw(TIMES).strftime("%Y-%m-%dT%H:%M:%SZ")
        forged = Line(number=number, time=time, silo="a", previous=previous, entry=data.draw(ENTRIES))
        named = _named_line(ledger, [*raws[:at], forged.serialised(), *raws[at:]], raws)
        assert abs(named - (at + 1)) <= 1


@FEW
@given(entries=LEDGERS, unnamed=UNNAMED, data=st.data())
def test_a_ledger_that_is_cut_off_anywhere_is_found(
    entries: list[Entry], unnamed: Entry | None, data: st.DataObject
) -> None:
    with _written(entries, unnamed) as (ledger, raws):
        size = data.draw(st.integers(0, len(b"".join(raws[: len(entries)])) - 1), label="size")
        cut = b"".join(raws)[:size]
        assert abs(_named_line(ledger, [cut], raws) - (cut.count(b"\n") + 1)) <= 1
