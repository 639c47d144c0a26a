"""The egress ledger: a line is on the disk before its message leaves, or nothing leaves; what was cut off is missed."""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path

import pytest

import gramfuse_client.guard.ledger as ledger_module
from gramfuse_client.guard.ledger import REASON, Ledger
from gramfuse_client.guard.ledger_lines import NO_LINE, Entry, Head, Item
from gramfuse_protocol.errors import LedgerError

NOON = datetime(2026, 1, 31, 12, tzinfo=UTC)
# The largest run id that Flower gives, and a name that JSON has to escape.
ENTRY = Entry(
    plan="a" * 64,
    session="b" * 32,
    run=2**64 - 1,
    phase="masked",
    kind="reply",
    form="masked",
    items=(
        Item(name='ma"sk\\ é', dtype="uint64", shape=(2, 3), bytes=48, sha256="c" * 64),
        Item(name="none", dtype="json", shape=(), bytes=0, sha256="d" * 64),
    ),
)
REFUSAL = Entry(phase="join", kind="refusal", form="open", note="this silo has not approved the plan")

APPEND = """
import sys
from pathlib import Path
from gramfuse_client.guard.ledger import Ledger
from gramfuse_client.guard.ledger_lines import Entry
ledger = Ledger(Path(sys.argv[1]), "a")
print("ready", flush=True)
sys.stdin.readline()
for n in range(50):
    ledger.append(Entry(phase="train", kind="reply", form="nothing", note=f"{sys.argv[2]} {n}"))
"""


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    return Ledger(tmp_path / "state" / "a" / "ledger.jsonl", "a")


def _head(ledger: Ledger) -> Path:
    return ledger.path.parent / "ledger.head"


def _refused(ledger: Ledger, match: str) -> None:
    """Nothing can be appended, the ledger stays as it is, and the other side reads no path."""
    files = [ledger.path, _head(ledger)]
    before = [path.read_bytes() if path.exists() else None for path in files]
    with pytest.raises(LedgerError, match=match) as caught:
        ledger.append(ENTRY)
    assert caught.value.reason == REASON
    assert str(ledger.path.parent) in str(caught.value)
    assert [path.read_bytes() if path.exists() else None for path in files] == before


def test_what_is_appended_is_read_again_in_a_chain_that_anyone_can_follow(ledger: Ledger) -> None:
    assert ledger.verify() == Head(0, NO_LINE, 0, "", "")
    east = timezone(timedelta(hours=2))
    written = [
        ledger.append(ENTRY, NOON),
        ledger.append(REFUSAL, (NOON - timedelta(hours=1)).astimezone(east)),  # the clock was set back
        ledger.append(ENTRY),
    ]
    assert list(ledger.lines()) == written
    assert [line.entry for line in written] == [ENTRY, REFUSAL, ENTRY]
    assert [line.time for line in written[:2]] == ["2026-01-31T12:00:00Z", "2026-01-31T11:00:00Z"]

    previous = NO_LINE
    for number, raw in enumerate(ledger.path.read_bytes().splitlines(), 1):
        document = json.loads(raw)
        assert (document["number"], document["previous"], document["silo"]) == (number, previous, "a")
        previous = hashlib.sha256(raw).hexdigest()
    assert json.loads(_head(ledger).read_bytes()) == {"number": 3, "digest": previous}
    assert ledger.verify() == Head(3, previous, 96, written[0].time, written[2].time)


def test_all_files_are_their_owner_s_and_a_ledger_that_others_may_read_is_not_used(ledger: Ledger) -> None:
    ledger.append(ENTRY)
    assert {path.name for path in ledger.path.parent.iterdir()} == {"ledger.jsonl", "ledger.lock", "ledger.head"}
    assert {path.stat().st_mode & 0o777 for path in ledger.path.parent.iterdir()} == {0o600}
    assert {path.stat().st_mode & 0o777 for path in (ledger.path.parent, ledger.path.parent.parent)} == {0o700}
    for mode in (0o640, 0o604):
        ledger.path.chmod(mode)
        _refused(ledger, f"mode {mode:o}.*chmod 600")
    ledger.path.chmod(0o600)
    assert ledger.append(ENTRY).number == 2


def test_two_processes_append_to_one_chain(ledger: Ledger) -> None:
    command = [sys.executable, "-c", APPEND, str(ledger.path)]
    processes = [
        subprocess.Popen([*command, name], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for name in "xy"
    ]
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()
    seen = 0
    while any(process.poll() is None for process in processes):  # a reader meets no half-written line meanwhile
        found = ledger.verify().number
        assert found >= seen
        seen = found
    for process in processes:
        process.communicate()
        assert process.returncode == 0
    notes = [line.entry.note for line in ledger.lines()]
    assert sorted(notes) == sorted(f"{name} {n}" for name in "xy" for n in range(50))


def test_a_reader_waits_for_a_line_that_is_half_written(ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    ledger.append(ENTRY)
    write, found = os.write, []
    reader = threading.Thread(target=lambda: found.append(ledger.verify().number))

    def slowly(descriptor: int, data: bytes) -> int:
        if reader.ident is None:
            reader.start()
        reader.join(0.1)
        assert reader.is_alive()
        return write(descriptor, bytes(data)[:500])

    monkeypatch.setattr(os, "write", slowly)
    ledger.append(ENTRY)
    reader.join()
    assert found == [2]


@pytest.mark.parametrize("block", [1, 7, 65536])
def test_an_incomplete_tail_is_reported_and_cut_off(
    ledger: Ledger, block: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(ledger_module, "BLOCK_BYTES", block)
    tail = ENTRY.model_dump_json().encode()
    for number in (1, 2, 3):
        ledger.path.parent.mkdir(parents=True, exist_ok=True)
        with os.fdopen(os.open(ledger.path, os.O_APPEND | os.O_CREAT | os.O_WRONLY, 0o600), "ab") as file:
            file.write(tail)
        with pytest.raises(LedgerError, match=f":{number}: line {number} is incomplete.*never left"):
            list(ledger.lines())
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            assert ledger.append(ENTRY).number == number
        assert "incomplete line" in caplog.text
        assert ledger.verify().number == number


def test_a_full_disk_leaves_the_ledger_as_it_was(ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    ledger.append(ENTRY)
    write, calls = os.write, 0

    def full(descriptor: int, data: bytes) -> int:
        nonlocal calls
        calls += 1
        if calls % 2:
            return write(descriptor, bytes(data)[:100])
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", full)
        _refused(ledger, "free disk space")
    assert calls == 2

    def broken(descriptor: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", broken)
        _refused(ledger, "Input/output error")
    assert ledger.append(REFUSAL).number == 2
    assert ledger.verify().number == 2


def test_a_head_that_cannot_be_written_stops_egress_and_never_falls_two_behind(
    ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    ledger.append(ENTRY)
    with monkeypatch.context() as patch:
        patch.setattr(ledger_module, "write_private", full)
        for _ in range(3):
            with pytest.raises(LedgerError, match="No space left") as caught:
                ledger.append(ENTRY)
            assert caught.value.reason == REASON
    assert ledger.verify().number == 2
    assert ledger.append(ENTRY).number == 3


def test_a_line_is_on_the_disk_before_append_returns(ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    fsync, synced = os.fsync, []

    def noted(descriptor: int) -> None:
        synced.append((os.fstat(descriptor).st_ino, os.fstat(descriptor).st_size))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", noted)
    ledger.append(ENTRY)
    directory, file, head = ledger.path.parent.stat(), ledger.path.stat(), _head(ledger).stat()
    order = [synced.index((found.st_ino, found.st_size)) for found in (file, head)]
    assert order == sorted(order)
    inodes = [inode for inode, _ in synced]
    assert directory.st_ino in inodes[: order[0]]  # the file's name is on the disk
    assert inodes[-1] == directory.st_ino  # and so is the head's


def test_the_head_may_be_one_line_behind_as_after_a_crash_and_no_more(ledger: Ledger) -> None:
    heads = []
    for _ in range(3):
        ledger.append(ENTRY)
        heads.append(_head(ledger).read_bytes())
    _head(ledger).write_bytes(heads[0])
    _refused(ledger, "names line 1, but .* lines up to 3")
    with pytest.raises(LedgerError, match=r":3: ledger\.head names line 1, but .* lines up to 3"):
        ledger.verify()
    _head(ledger).write_bytes(heads[1])
    assert ledger.verify().number == 3
    assert ledger.append(ENTRY).number == 4


def test_nothing_leaves_after_damage_at_the_end(ledger: Ledger) -> None:
    for _ in range(3):
        ledger.append(ENTRY, NOON)
    good, head = ledger.path.read_bytes(), _head(ledger).read_bytes()
    first, second, third = good.splitlines(keepends=True)
    for content, match in [
        (b"", "the last 3 lines are missing"),
        (first + second, "missing"),
        (first + second + third[:-1], "missing"),
        (first + second + third.replace(b"12:00", b"13:00"), "the last line, 3, was changed"),
        (first + second + b"\0" * 9 + b"\n", "not JSON"),
        (first + second + third.replace(b'"silo":"a"', b'"silo":"b"'), "belongs to silo 'b'"),
        (first + second + third.replace(b'"number"', b'"numbers"'), "numbers?: "),
        (first + second + third.replace(b",", b", ", 1), "not in canonical form"),
    ]:
        ledger.path.write_bytes(content)
        _refused(ledger, match)
        with pytest.raises(LedgerError, match=r"ledger\.jsonl:[0-3]: "):
            list(ledger.lines())
    ledger.path.unlink()
    with pytest.raises(LedgerError, match="the last 3 lines are missing"):
        ledger.verify()
    ledger.path.touch(0o600)
    _refused(ledger, "the last 3 lines are missing")

    ledger.path.write_bytes(good)
    _head(ledger).write_bytes(head[:-4])
    _refused(ledger, "ledger.head: is damaged")
    _head(ledger).write_bytes(head)
    with pytest.raises(LedgerError, match="belongs to silo 'a'") as caught:
        Ledger(ledger.path, "b").append(ENTRY)
    assert caught.value.reason == REASON
    assert ledger.append(ENTRY).number == 4


DAMAGE: dict[str, Callable[[list[bytes]], list[bytes]]] = {
    "4: line 4 does not follow line 3": lambda r: [*r[:2], r[2].replace(b"12:02", b"12:03"), *r[3:]],
    "3: line 3 has number 7 instead of 3": lambda r: [*r[:2], r[2].replace(b'"number":3', b'"number":7'), *r[3:]],
    "5: the last line, 5, was changed": lambda r: [*r[:4], r[4].replace(b"12:04", b"12:05")],
    "1: line 1 has number 2 instead of 1": lambda r: r[1:],
    "3: line 3 has number 4 instead of 3": lambda r: [*r[:2], *r[3:]],
    "2: line 2 has number 5 instead of 2": lambda r: [r[0], r[4]],
    "3: the last 2 lines are missing": lambda r: r[:3],
    "4: line 4 has number 3 instead of 4": lambda r: [*r[:3], *r[2:]],
    "4: line 4 has number 1 instead of 4": lambda r: [*r[:3], r[0], *r[3:]],
    "2: line 2 has number 3 instead of 2": lambda r: [r[0], r[2], r[1], *r[3:]],
    "1: line 1 has number 5 instead of 1": lambda r: [r[4], *r[1:4], r[0]],
    "2: line 2 is not JSON": lambda r: [r[0], r[1].replace(b"{", b"", 1), *r[2:]],
    "2: line 2 is not a line of a ledger: more: ": lambda r: [r[0], r[1].replace(b"{", b'{"more":1,', 1), *r[2:]],
    "2: line 2 was changed: it is not in canonical form": lambda r: [r[0], r[1].replace(b":", b": ", 1), *r[2:]],
    "2: line 2 belongs to silo 'b'": lambda r: [r[0], r[1].replace(b'"silo":"a"', b'"silo":"b"'), *r[2:]],
    "5: line 5 was cut short": lambda r: [*r[:4], r[4][:-1]],
}


@pytest.mark.parametrize("says", DAMAGE)
def test_damage_is_found_and_its_line_named(ledger: Ledger, says: str) -> None:
    for n in range(5):
        ledger.append(ENTRY, NOON + timedelta(minutes=n))
    ledger.path.write_bytes(b"".join(DAMAGE[says](ledger.path.read_bytes().splitlines(keepends=True))))
    with pytest.raises(LedgerError, match=re.escape(f"{ledger.path}:{says}")):
        ledger.verify()


def test_a_forged_line_that_fits_is_found_by_the_line_after_it(ledger: Ledger) -> None:
    lines = [ledger.append(ENTRY) for _ in range(4)]
    forged = lines[2].model_copy(update={"entry": REFUSAL})
    ledger.path.write_bytes(b"".join(line.serialised() for line in [*lines[:2], forged, *lines[2:]]))
    with pytest.raises(LedgerError, match=":4: line 4 has number 3 instead of 4"):
        ledger.verify()


def test_a_ledger_that_is_no_file_or_has_no_place_stops_egress(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "directory.jsonl").mkdir()
    for path in (tmp_path / "file" / "ledger.jsonl", tmp_path / "directory.jsonl"):
        with pytest.raises(LedgerError, match="cannot be written") as caught:
            Ledger(path, "a").append(ENTRY)
        assert caught.value.reason == REASON


def test_a_digest_noted_elsewhere_finds_a_ledger_that_was_written_anew(ledger: Ledger, tmp_path: Path) -> None:
    notes = [NO_LINE]
    for n in range(4):
        ledger.append(ENTRY, NOON + timedelta(minutes=n))
        notes.append(ledger.verify().digest)
    assert {ledger.verify(noted).digest for noted in notes} == {notes[-1]}

    forged = Ledger(tmp_path / "forged" / "ledger.jsonl", "a")
    for n in range(4):
        forged.append(REFUSAL if n == 2 else ENTRY, NOON + timedelta(minutes=n))
    assert forged.verify().number == 4
    assert forged.verify(notes[2]).number == 4
    for noted in notes[3:]:
        with pytest.raises(LedgerError, match=noted):
            forged.verify(noted)
