"""The supervisor under processes that die, hang and do not want to end; and its own violent death."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from gramfuse_deployment import processes, supervisor
from gramfuse_deployment.supervisor import Service, mark_of, reason, supervised
from gramfuse_protocol.errors import FederationError, PlanError


def shell(directory: Path, name: str, script: str, **more: object) -> Service:
    """A service that is a shell script; it is ready once a file of its name is there."""
    ready: Callable[[], bool] = (directory / name).exists
    return Service(name, ["sh", "-c", script], directory / f"{name}.log", {}, **{"ready": ready, **more})  # type: ignore[arg-type]


def left(directory: Path) -> list[psutil.Process]:
    """All processes that the supervisor of a directory started and that are there still."""
    return processes.marked(mark_of(directory))


def wait_for(what: Callable[[], object], seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_services_start_in_order_and_end_in_reverse(tmp_path: Path) -> None:
    # Each notes its start, takes a while to be ready, and notes its end.
    script = "trap 'echo {0} ends >> order; exit 0' TERM; echo {0} starts >> order; sleep 0.3; touch {0}; {1}"
    wait = "while :; do sleep 0.1; done"
    with supervised(tmp_path) as running:
        for name in ("a", "b"):
            running.start(shell(tmp_path, name, script.format(name, wait)))
            assert (tmp_path / name).exists()
        assert (tmp_path / "a.log").stat().st_mode & 0o777 == 0o600
    assert (tmp_path / "order").read_text().splitlines() == ["a starts", "b starts", "b ends", "a ends"]
    assert not left(tmp_path)


def test_what_does_not_start_is_an_error_with_its_last_lines(tmp_path: Path) -> None:
    with pytest.raises(FederationError) as caught, supervised(tmp_path) as running:  # noqa: PT012
        running.start(shell(tmp_path, "good", "touch good; sleep 60"))
        running.start(shell(tmp_path, "bad", "echo no such database >&2; exit 7"))
    message = str(caught.value)
    for words in ("bad ended with status 7", str(tmp_path / "bad.log"), "no such database"):
        assert words in message
    assert not left(tmp_path)
    with pytest.raises(FederationError, match="cannot be started"), supervised(tmp_path) as running:
        running.start(Service("ghost", [str(tmp_path / "nowhere")], tmp_path / "ghost.log", {}))


def test_what_is_never_ready_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervisor, "START_SECONDS", 0.5)
    with pytest.raises(FederationError, match=r"idle .*0 s"), supervised(tmp_path) as running:
        running.start(shell(tmp_path, "idle", "sleep 60"))
    assert not left(tmp_path)


def test_what_ends_is_started_again_ever_more_slowly(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    script = (
        "echo start >> starts; echo 'Exit Code: 305'; echo '[code: 2004] refused'; echo; echo 'see elsewhere'; exit 1"
    )
    service = shell(tmp_path, "node", script, ready=None, advice=lambda output: "ask" if "2004" in output else "")
    starts = tmp_path / "starts"
    with supervised(tmp_path) as running:
        running.start(service)
        running._all[0].wait = 0.2
        begin = time.monotonic()
        while not starts.exists() or len(starts.read_text().splitlines()) < 4:
            running.poll()
            time.sleep(0.01)
        took = time.monotonic() - begin
    assert took > 0.2 + 0.4 + 0.8
    said = capfd.readouterr().err.splitlines()
    assert "node ended with status 1: Exit Code: 305 [code: 2004] refused; ask; restarting in 0 s" in said[0]
    assert "node ended as before; restarting in 0 s" in said[1]
    assert "elsewhere" not in "".join(said)


def test_what_ran_for_long_is_started_again_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervisor, "STEADY_SECONDS", 0.3)
    with supervised(tmp_path) as running:
        running.start(shell(tmp_path, "long", "touch long; sleep 60"))
        state = running._all[0]
        state.wait = 64.0
        time.sleep(0.4)
        state.process.kill()
        wait_for(lambda: (running.poll(), state.restart_at)[1])
        assert state.restart_at is not None
        assert state.restart_at - time.monotonic() <= supervisor.FIRST_WAIT


def test_what_does_not_want_to_end_is_killed_and_so_is_what_it_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processes, "GRACE_SECONDS", 0.5)
    stubborn = "trap '' TERM; (trap '' TERM; exec setsid sleep 61) & touch stubborn; while :; do sleep 0.1; done"
    with supervised(tmp_path) as running:
        running.start(shell(tmp_path, "stubborn", stubborn))
        wait_for(lambda: len(left(tmp_path)) >= 3)
    assert not left(tmp_path)


def test_children_of_a_process_that_was_killed_do_not_stay(tmp_path: Path) -> None:
    with supervised(tmp_path) as running:
        running.start(shell(tmp_path, "parent", "sleep 62 & echo $! > child; touch parent; wait"))
        child = psutil.Process(int((tmp_path / "child").read_text()))
        running._all[0].process.kill()
        wait_for(lambda: (running.poll(), running._all[0].restart_at)[1])
        wait_for(lambda: not child.is_running() or child.status() == psutil.STATUS_ZOMBIE)


def test_a_long_log_begins_anew_and_the_old_one_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervisor, "LOG_BYTES", 1000)
    with supervised(tmp_path) as running:
        running.start(shell(tmp_path, "talker", "touch talker; while :; do echo 0123456789; sleep 0.001; done"))
        old = tmp_path / "talker.log.old"
        wait_for(lambda: (running.poll(), old.exists())[1])
        assert old.stat().st_size > 1000
        # It goes on in the new one, from its beginning.
        wait_for(lambda: (tmp_path / "talker.log").read_bytes().startswith(b"01"))
        assert b"\0" not in (tmp_path / "talker.log").read_bytes()


def test_a_directory_has_one_supervisor(tmp_path: Path) -> None:
    with supervised(tmp_path), pytest.raises(PlanError, match="is in use"), supervised(tmp_path):
        pass
    with supervised(tmp_path):
        pass


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_the_supervisors_own_end_is_that_of_its_processes(tmp_path: Path, how: signal.Signals) -> None:
    program = f"""
import signal, sys, time
from contextlib import suppress
from pathlib import Path
from gramfuse_cli.main import _interrupt
from gramfuse_deployment.supervisor import Service, supervised
for stop in (signal.SIGTERM, signal.SIGHUP):
    signal.signal(stop, _interrupt)
here = Path({str(tmp_path)!r})
with suppress(KeyboardInterrupt), supervised(here) as running:
    script = "trap 'echo polite > ended; exit 0' TERM; (exec setsid sleep 63) & touch up; while :; do sleep 0.1; done"
    running.start(Service("child", ["sh", "-c", script], here / "child.log", {{}}, ready=(here / "up").exists))
    print("up", flush=True)
    while True:
        running.poll()
        time.sleep(0.1)
"""
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE) as command:
        assert command.stdout is not None
        assert command.stdout.readline() == b"up\n"
        assert len(left(tmp_path)) >= 2
        os.kill(command.pid, how)
        assert command.wait(20) == (-9 if how == signal.SIGKILL else 0)
    wait_for(lambda: not left(tmp_path))
    assert (tmp_path / "ended").read_text() == "polite\n"
    wait_for(lambda: _free(tmp_path))  # the directory is free again


def _free(directory: Path) -> bool:
    try:
        with supervised(directory):
            return True
    except PlanError:
        return False


def test_why_a_process_ended_is_said_in_one_line() -> None:
    flower = (
        "INFO: up\nERROR :  Exit Code: 305\nFailed.\n[code: 2004] No.\n\nFor more information, visit: <…>\nINFO: bye\n"
    )
    assert reason(flower) == "Exit Code: 305 Failed. [code: 2004] No."
    assert reason("Exit Code: 302") == "Exit Code: 302"
    assert reason("one\n\ntwo\nthree\n\n") == "two three"
    assert reason("") == ""
