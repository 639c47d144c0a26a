"""Secrets are on the silos' own disks and nowhere else."""

from __future__ import annotations

import json
import logging
import stat
from pathlib import Path
from typing import Any

import pytest
from flwr.app import Error, RecordDict

from gramfuse_protocol.errors import RefusalError
from gramfuse_protocol.messages.flower_records import from_record, to_record
from gramfuse_protocol.messages.phases import REPLIES, Refusal
from gramfuse_protocol.messages.wire import pack, unpack
from tests.exchange.secure.coordinator import STEPS, Coordinator, flipped, session_of
from tests.exchange.secure.runs import NAMES, A, Answer, B, D, Run, Site, Watched, gone, left


def test_state_is_private_to_its_owner_at_every_step(script: Coordinator) -> None:
    for step in (*STEPS[1:], "."):
        for name in NAMES:
            for path in (script.place / step / "state" / name / script.plan.digest).rglob("*"):
                mode = stat.S_IMODE(path.stat().st_mode)
                assert mode == (0o700 if path.is_dir() else 0o600), path
                assert not path.name.endswith(".partial")
    masked = session_of(script, script.place / "survivors", A) / "statistics.masked"
    assert masked.stat().st_size == 8 * script.site.layout.sum_entries


def test_secrets_are_nowhere_but_on_the_silos_disk(
    site: Site, in_process_grid: Any, place: Path, watched: Watched, caplog: pytest.LogCaptureFixture
) -> None:
    secret_files = {name: site.project.identity(name).read_text().splitlines()[1] for name in NAMES[:4]}
    with caplog.at_level(logging.DEBUG):
        run = Run(site, site.plan(silos=4), place)
        run.start(in_process_grid, fault=gone({B: ("unmask", 1)}, refuses=True))
        lying = Run(site, run.plan, place / "second")
        with pytest.raises(RefusalError, match="cannot be decrypted") as caught:
            lying.start(in_process_grid, fault=spoil_shares)
    assert left(lying, caught.value)["failure"]["error"] == "RefusalError"
    assert "SecurityError" in {reply.error for reply in lying.of(Refusal)}
    assert len(caplog.records) > 50
    assert {record.levelname for record in caplog.records} >= {"INFO", "ERROR"}
    places = {
        "log": caplog.text + "".join(str(record.__dict__) for record in caplog.records),
        "events": json.dumps(run.events + lying.events),
        "report": json.dumps(run.report),
        "refusals": "".join(reply.reason for reply in run.of(Refusal) + lying.of(Refusal)),
        "contexts": "".join(str(context) for r in (run, lying) for context in r.grid.contexts.values()),
        **{path.name: path.read_text() for path in run.out.glob("*.*") if path.is_file()},
        **{f"failed {path.name}": path.read_text() for path in lying.out.with_name("run.failed").iterdir()},
    }
    assert "transcript.jsonl" in places
    assert all(not context.state for r in (run, lying) for context in r.grid.contexts.values())
    secrets = watched.secrets | watched.shares | set(secret_files.values())
    assert len(secrets) > 4 * (5 + 4 * 4)
    for name, text in places.items():
        assert not [secret for secret in secrets if secret in text], name


def spoil_shares(visit: Any, deliver: Answer) -> RecordDict | Error:
    """What one silo sealed for the others is changed on the way, so that each of them ends the session."""
    reply = unpack(from_record(deliver()), REPLIES)
    if (visit.node, visit.phase) == (D, "shares"):
        reply = reply.model_copy(update={"sealed": {peer: flipped(text) for peer, text in reply.sealed.items()}})
    return to_record(pack(reply))
