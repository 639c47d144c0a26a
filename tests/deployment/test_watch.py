"""A silo's watch: a request that nothing works on is noticed, and no other."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from gramfuse_deployment import silo_watch
from gramfuse_deployment.silo_watch import STALLED_SECONDS, WORKER_SECONDS, Watch

RECEIVED = ["[RUN 7]", "Receiving: query.join message (ID: a)", "Received successfully"]
ANSWERED = ["[RUN 7]", "Sending: query.join message (ID: b)", "Sent successfully"]
LEFT_OVER = ["[RUN 6]", "Sending: query.shares message (ID: c)", "Run ID 6 is not in `RUNNING` status. Ignoring reply"]


class Clock:
    """A clock that is set by hand."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    found = Clock()
    monkeypatch.setattr(silo_watch, "time", found)
    return found


def watch_of(tmp_path: Path, lines: list[str]) -> Watch:
    silo: Any = SimpleNamespace(name="silo-a", state=tmp_path, ledger=tmp_path / "ledger.jsonl")
    watch = Watch(silo, "localhost:1", tmp_path, tls=True)
    text = "".join(f"\x1b[92mINFO \x1b[0m:      {line}\n" for line in ["SuperNode ID: 1", *lines])
    (tmp_path / "supernode.log").write_text(text)
    watch.look()
    return watch


@pytest.mark.parametrize(
    ("lines", "forsaken"),
    [
        (RECEIVED, True),
        (RECEIVED + LEFT_OVER, True),
        (RECEIVED + ANSWERED, False),
        ([*RECEIVED[:2], "Failed to receive message a: gone"], False),
        ([*RECEIVED[:2], "Run ID 7 is not in `RUNNING` status. Ignoring message a."], False),
        (RECEIVED + ANSWERED + RECEIVED, True),
        ([], False),
    ],
)
def test_a_request_that_no_worker_answers_is_forsaken(
    lines: list[str], forsaken: bool, tmp_path: Path, clock: Clock
) -> None:
    watch = watch_of(tmp_path, lines)
    clock.now += STALLED_SECONDS - 1
    assert not watch.request_stalled(lambda: False)
    clock.now += 2
    assert watch.request_stalled(lambda: False) is forsaken
    assert not watch.request_stalled(lambda: False)  # a node takes its time to end


def test_a_worker_may_take_as_long_as_it_likes(tmp_path: Path, clock: Clock) -> None:
    watch = watch_of(tmp_path, RECEIVED)
    for _ in range(100):
        clock.now += WORKER_SECONDS + 1
        assert not watch.request_stalled(lambda: True)
    clock.now += STALLED_SECONDS + 1
    assert watch.request_stalled(lambda: False)


def test_a_node_that_ended_holds_nothing(tmp_path: Path, clock: Clock) -> None:
    watch = watch_of(tmp_path, RECEIVED)
    watch.advice("[code: 2001]")
    clock.now += STALLED_SECONDS + 1
    assert not watch.request_stalled(lambda: False)
