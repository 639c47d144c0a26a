"""Room, memory, state and ledger of a silo's machine."""

from __future__ import annotations

import shutil
from datetime import UTC, datetime

import pytest

from gramfuse_client.dry_run import of_machine
from gramfuse_client.guard.ledger import Ledger
from gramfuse_client.guard.ledger_lines import Entry
from gramfuse_client.silo_file import Silo
from tests.client.dry_run.sites import NAME, Site, finding, problems


def test_too_little_room_or_memory_is_named(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(of_machine.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 10**9, 10**6))
    monkeypatch.setattr(of_machine, "available_memory", lambda: 10**6)
    found = problems(site.check(offline=True))
    assert found.keys() == {"disk", "memory"}
    assert "1.0 MB free" in found["disk"]
    assert "masked vector 0.1 MB" in found["disk"]
    assert "1.0 MB free" in found["memory"]
    assert "block:128" in found["memory"]


def test_a_state_directory_that_cannot_be_made_is_named(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(of_machine.os, "access", lambda *_: False)
    assert "install -d -m 700" in problems(site.check(offline=True))["state"]
    Silo.read(site.silo).state.mkdir(mode=0o700)
    assert "cannot write" in problems(site.check(offline=True))["state"]
    Silo.read(site.silo).state.rmdir()
    Silo.read(site.silo).state.touch()
    assert "not a directory" in problems(site.check(offline=True))["state"]


@pytest.fixture
def ledger(site: Site) -> Ledger:
    silo = Silo.read(site.silo)
    ledger = Ledger(silo.ledger, NAME)
    for note in ("one", "two"):
        ledger.append(Entry(phase="join", kind="refusal", form="reason", note=note), datetime(2026, 2, 3, tzinfo=UTC))
    return ledger


def test_a_ledger_that_holds_together_is_summed_up(site: Site, ledger: Ledger) -> None:
    found = finding(site.check(offline=True), "ledger")
    assert found.state == "ok"
    assert "2 lines" in found.what
    assert ledger.verify().digest in found.what
    before = datetime(2026, 2, 2, tzinfo=UTC)
    assert "before the last line" in problems(site.check(offline=True, now=before))["clock"]


def test_a_damaged_ledger_is_named_and_a_line_cut_short_is_no_damage(site: Site, ledger: Ledger) -> None:
    content = ledger.path.read_bytes()
    ledger.path.write_bytes(content + content[:40])
    found = finding(site.check(offline=True), "ledger")
    assert found.state == "ok"
    assert "never left" in found.what
    ledger.path.write_bytes(content.replace(b'"one"', b'"eno"'))
    assert "ledger.jsonl:2: line 2 does not follow line 1" in problems(site.check(offline=True))["ledger"]
    ledger.path.write_bytes(content[:-20])
    assert "cut short" in problems(site.check(offline=True))["ledger"]
    ledger.path.unlink()
    assert "missing" in problems(site.check(offline=True))["ledger"]
    ledger.path.write_bytes(content)
    ledger.path.chmod(0o644)
    assert "chmod 600" in problems(site.check(offline=True))["ledger"]
