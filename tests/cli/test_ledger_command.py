"""`gramfuse silo ledger`: what is shown is verified, damage is located, copies are whole, and nothing is written."""

from __future__ import annotations

import csv
import hashlib
import json
import os
import sys
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from gramfuse_cli.commands import silo_ledger as command
from gramfuse_cli.main import main
from gramfuse_client.guard.ledger import Ledger
from gramfuse_client.guard.ledger_lines import NO_LINE, Entry, Item
from gramfuse_client.silo_file import Silo

PLANS = ("a" * 64, "b" * 64)
SESSION = "c" * 32
NOON = datetime(2026, 1, 31, 12, tzinfo=UTC)


class Outcome(NamedTuple):
    """What a command left."""

    code: int
    out: str
    err: str


@pytest.fixture
def silo(tmp_path: Path) -> Path:
    path = tmp_path / "north.toml"
    path.write_text('name = "north"\n[data]\ntrain = "t.jsonl"\nheld-out = 0.2\n')
    return path


@pytest.fixture
def ledger(silo: Path) -> Ledger:
    """Five lines: two plans, a refusal, an error that has no items, and text that a spreadsheet would calculate."""
    ledger = Ledger(Silo.read(silo).ledger, "north")
    header = Item(name="header", dtype="json", shape=(), bytes=200, sha256="d" * 64)
    masked = Item(name="masked", dtype="uint64", shape=(1000, 2), bytes=16000, sha256="e" * 64)
    about: dict[str, Any] = {"session": SESSION, "run": 2**63, "kind": "reply"}
    entries = [
        Entry(plan=PLANS[0], **about, phase="join", form="no data", items=(header,)),
        Entry(plan=PLANS[0], **about, phase="masked", form="masked", items=(header, masked)),
        Entry(plan=PLANS[1], **about | {"kind": "refusal"}, phase="join", form="reason", note="RefusalError: no"),
        Entry(phase="query.[/x]", kind="error", form="reason", note="=HYPERLINK(\"x\")"),
        Entry(plan=PLANS[1], **about, phase="train", form="open", note="[bold]-1", items=(header,)),
    ]  # fmt: skip
    for n, entry in enumerate(entries):
        ledger.append(entry, NOON + timedelta(hours=n))
    return ledger


@pytest.fixture
def run(
    silo: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Iterator[Callable[..., Outcome]]:
    """Return a function that runs `gramfuse silo ledger`, and check that all its commands left the state as it was."""
    before: dict[str, Any] = {}

    def look() -> dict[str, Any]:
        state = Silo.read(silo).state
        return {str(p): (p.stat().st_mtime_ns, p.read_bytes() if p.is_file() else None) for p in state.rglob("*")}

    def run(name: str, *arguments: str | Path) -> Outcome:
        before.update(look())
        monkeypatch.setattr(sys, "argv", ["gramfuse", "silo", "ledger", name, str(silo), *map(str, arguments)])
        monkeypatch.setattr("signal.signal", lambda *_: None)
        capfd.readouterr()
        with pytest.raises(SystemExit) as caught:
            main()
        assert look() == before
        assert isinstance(caught.value.code, int)
        return Outcome(caught.value.code, *capfd.readouterr())

    return run


def damage(ledger: Ledger) -> None:
    ledger.path.write_bytes(ledger.path.read_bytes().replace(b'"masked"', b'"marked"', 1))


def test_show_has_a_line_for_each_and_nothing_that_a_terminal_obeys(
    ledger: Ledger, run: Callable[..., Outcome]
) -> None:
    outcome = run("show")
    assert outcome.code == 0
    assert "2026-01-31 13:00:00" in outcome.out
    assert "16,200" in outcome.out
    assert "RefusalError: no" in outcome.out
    assert "[bold]-1" in outcome.out
    assert "query.[/x]" in outcome.out
    assert "\x1b" not in outcome.out
    assert "e" * 64 not in outcome.out
    lines = [line for line in outcome.out.splitlines() if "2026-" in line]
    assert [line.split()[0] for line in lines] == ["1", "2", "3", "4", "5"]


def test_show_items_and_last(ledger: Ledger, run: Callable[..., Outcome]) -> None:
    out = run("show", "--items").out
    assert "uint64 [1000, 2] " + "e" * 64 in out
    out = run("show", "--last", "1").out
    assert [line.split()[0] for line in out.splitlines() if "2026-" in line] == ["5"]


def test_show_as_json_is_one_object_from_which_the_chain_can_be_followed(
    ledger: Ledger, run: Callable[..., Outcome]
) -> None:
    document = json.loads(run("show", "--json").out)
    assert document["silo"] == "north"
    assert [line["number"] for line in document["lines"]] == [1, 2, 3, 4, 5]
    assert document["lines"][1]["entry"]["items"][1]["shape"] == [1000, 2]
    previous = NO_LINE
    for line in document["lines"]:
        assert line["previous"] == previous
        previous = line["digest"]
    assert previous == ledger.verify().digest
    assert len(json.loads(run("show", "--json", "--last", "2").out)["lines"]) == 2


def test_a_silo_from_which_nothing_left_has_nothing_to_show(run: Callable[..., Outcome], tmp_path: Path) -> None:
    assert "north has sent nothing" in run("show").out
    assert json.loads(run("show", "--json").out)["lines"] == []
    outcome = run("verify")
    assert outcome.code == 0
    assert "lines   0" in outcome.out
    assert json.loads(run("verify", "--json").out)["first"] is None
    assert run("export", "--out", tmp_path / "copy").code == 0
    assert (tmp_path / "copy").read_bytes() == b""
    assert not (tmp_path / "north.state").exists()


def test_verify_says_where_the_chain_ends(ledger: Ledger, run: Callable[..., Outcome]) -> None:
    head = ledger.verify()
    outcome = run("verify")
    assert outcome.code == 0
    for words in ("lines   5", "2026-01-31T12:00:00Z", "2026-01-31T16:00:00Z", "16,600", head.digest):
        assert words in outcome.out
    assert "Note this digest" in outcome.err
    assert json.loads(run("verify", "--json").out) == {
        "ledger": str(ledger.path),
        "silo": "north",
        "lines": 5,
        "first": "2026-01-31T12:00:00Z",
        "last": "2026-01-31T16:00:00Z",
        "bytes": 16600,
        "head": head.digest,
        "end_is_known": True,
    }


def test_verify_holds_a_digest_that_was_noted_against_the_ledger(ledger: Ledger, run: Callable[..., Outcome]) -> None:
    lines = list(ledger.lines())
    assert run("verify", "--head", lines[2].digest).code == 0
    outcome = run("verify", "--head", "f" * 64)
    assert outcome.code == 18
    assert "no line has" in outcome.err
    outcome = run("verify", "--head", "F")
    assert outcome.code == 2
    assert "64 hexadecimal digits" in outcome.err


@pytest.mark.parametrize("name", ["show", "verify", "export"])
@pytest.mark.parametrize("as_json", [(), ("--json",)])
def test_damage_is_named_with_file_and_line(
    ledger: Ledger, run: Callable[..., Outcome], tmp_path: Path, name: str, as_json: tuple[str, ...]
) -> None:
    damage(ledger)
    out = ("--out", str(tmp_path / "copy")) if name == "export" else ()
    outcome = run(name, *out, *as_json)
    assert outcome.code == 18
    assert f"{ledger.path}:3: line 3 does not follow line 2" in outcome.err
    if as_json:
        assert json.loads(outcome.out)["error"]["type"] == "LedgerError"
    assert not [path for path in tmp_path.iterdir() if "copy" in path.name]


def test_without_the_head_an_end_that_was_cut_off_is_said_to_be_unknown(
    ledger: Ledger, run: Callable[..., Outcome]
) -> None:
    ledger.path.with_suffix(".head").unlink()
    assert "ledger.head is missing" in run("verify").err
    assert json.loads(run("verify", "--json").out)["end_is_known"] is False


def test_a_copy_is_the_ledger_itself_for_its_owner_only(
    ledger: Ledger, run: Callable[..., Outcome], tmp_path: Path
) -> None:
    copy = tmp_path / "copy.jsonl"
    os.umask(0o000)
    try:
        outcome = run("export", "--out", copy)
    finally:
        os.umask(0o022)
    assert outcome.code == 0
    assert copy.read_bytes() == ledger.path.read_bytes()
    assert copy.stat().st_mode & 0o777 == 0o600
    assert [line for line in outcome.out.splitlines() if line.startswith("plan")] == [f"plan  {plan}" for plan in PLANS]
    previous = NO_LINE  # as somebody follows the chain who has sha256sum only
    for line in copy.read_bytes().splitlines():
        assert json.loads(line)["previous"] == previous
        previous = hashlib.sha256(line).hexdigest()
    document = json.loads(run("export", "--out", tmp_path / "other.jsonl", "--json").out)
    assert document["head"] == previous
    assert document["plans"] == list(PLANS)
    assert (document["lines"], document["format"]) == (5, "jsonl")


def test_a_spreadsheet_has_a_row_for_each_item_and_nothing_to_calculate(
    ledger: Ledger, run: Callable[..., Outcome], tmp_path: Path
) -> None:
    copy = tmp_path / "copy.csv"
    assert run("export", "--csv", "--out", copy).code == 0
    with copy.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["number"] for row in rows] == ["1", "2", "2", "3", "4", "5"]
    assert rows[2]["item"] == "masked"
    assert rows[2]["shape"] == "1000x2"
    assert rows[2]["bytes"] == "16000"
    assert {row["plan"] for row in rows} == {*PLANS, ""}
    assert rows[4]["note"] == '\'=HYPERLINK("x")'
    assert rows[-1]["digest"] == ledger.verify().digest
    assert copy.stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("text", ["=1", "+1", "-1", "@x", " =1", "\t=1", "\rx"])
def test_what_a_spreadsheet_would_calculate_becomes_text(text: str) -> None:
    assert command._cell(text) == f"'{text}"


@pytest.mark.parametrize("value", ["masked", "", 0, 16000, "a=b", "2026-01-31T12:00:00Z"])
def test_all_else_stays_as_it_is(value: Any) -> None:
    assert command._cell(value) == value


def test_a_file_that_is_there_is_not_written_over(ledger: Ledger, run: Callable[..., Outcome], tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    copy.write_text("mine")
    outcome = run("export", "--out", copy, "--json")
    assert outcome.code == 2
    assert "exists already" in json.loads(outcome.out)["error"]["message"]
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "nowhere")
    assert run("export", "--out", link).code == 2
    assert copy.read_text() == "mine"
    assert {path.name for path in tmp_path.iterdir()} == {"north.toml", "north.state", "copy", "link"}


def test_a_file_that_another_process_makes_meanwhile_is_not_written_over(tmp_path: Path) -> None:
    copy = tmp_path / "copy"

    def chunks() -> Iterator[bytes]:
        copy.write_text("theirs")
        yield b"ours"

    with pytest.raises(command.click.BadParameter, match="exists already"):
        command._write_new(copy, chunks())
    assert copy.read_text() == "theirs"
    assert list(tmp_path.iterdir()) == [copy]


def test_a_place_that_cannot_be_written_is_named(ledger: Ledger, run: Callable[..., Outcome], tmp_path: Path) -> None:
    outcome = run("export", "--out", tmp_path / "nowhere" / "copy")
    assert outcome.code == 18
    assert f"{tmp_path}/nowhere/copy: cannot write" in outcome.err


def test_help_says_what_the_words_mean(run: Callable[..., Outcome]) -> None:
    assert "'masked' is random" in " ".join(run("show", "--help").out.split())
    assert "note the head digest" in " ".join(run("verify", "--help").out.split())
