"""The run directory: complete and under its name, or not there at all."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from safetensors.numpy import save_file

from gramfuse_protocol.errors import (
    ContributionError,
    FederationError,
    GramfuseError,
    RefusalError,
    RunDirectoryError,
    SecurityError,
)
from gramfuse_server.run.spool import Spool
from gramfuse_server.run_directory import RunDirectory, checkpoint_text, discard, rewrite


def test_a_finished_run_has_its_name_and_sums_that_verify(tmp_path: Path) -> None:
    with RunDirectory(tmp_path / "runs" / "one", needed=1) as run:
        assert not run.path.exists(), "nobody may take a run under way for a complete one"
        run.write("report.json", '{"label": "Müller"}')
        run.record({"phase": "join", "silo": "silo-a"})
        run.record({"phase": "train", "silo": "silo-a"})
        (run.partial / "model").mkdir()
        (run.partial / "model" / "weights.bin").write_bytes(bytes(range(256)) * 100)
        path = run.finish()
    assert path == tmp_path / "runs" / "one"
    assert [p.name for p in path.parent.iterdir()] == ["one"]
    entries = [json.loads(line) for line in (path / "transcript.jsonl").read_text().splitlines()]
    assert [entry["phase"] for entry in entries] == ["join", "train"]
    sums = dict(line.split("  ")[::-1] for line in (path / "SHA256SUMS").read_text().splitlines())
    files = {p.relative_to(path).as_posix() for p in path.rglob("*") if p.is_file()}
    assert set(sums) == files - {"SHA256SUMS"} == {"report.json", "transcript.jsonl", "model/weights.bin"}
    for name, digest in sums.items():
        assert hashlib.sha256((path / name).read_bytes()).hexdigest() == digest


def test_a_run_is_its_owners_only_whatever_the_umask(tmp_path: Path) -> None:
    def modes(directory: Path) -> dict[str, int]:
        return {p.name: p.stat().st_mode & 0o777 for p in (directory, *directory.rglob("*"))}

    before = os.umask(0)
    try:
        with RunDirectory(tmp_path / "one", needed=1) as run:
            assert modes(run.partial)["one.partial"] == 0o700  # what is in there is out of others' reach already
            run.write("report.json", "{}")
            Spool(run.partial / "spool").save("silo-a", 0, {"words": np.zeros(1, np.uint64)})
            (run.partial / "model").mkdir()
            (run.partial / "model" / "model.safetensors").write_bytes(b"weights")
            path = run.finish()
        rewrite(path, "report.json", '{"seen": true}')
        names = {"one": 0o700, "model": 0o700, "model.safetensors": 0o600, "report.json": 0o600, "SHA256SUMS": 0o600}
        assert modes(path) == names

        run = RunDirectory(tmp_path / "two", needed=1)
        run.account = lambda error, kept: {"report.html": "why", "report.json": "{}"}
        run.__enter__()
        run.record({"phase": "join"})
        run.__exit__(FederationError, FederationError("lost"), None)
        names = {"two.failed": 0o700, "report.html": 0o600, "report.json": 0o600, "transcript.jsonl": 0o600}
        assert modes(tmp_path / "two.failed") == names
    finally:
        os.umask(before)


@pytest.mark.parametrize("name", ["one", "one.partial"])
@pytest.mark.parametrize("kind", ["directory", "file"])
def test_a_run_directory_that_exists_is_named_and_left_as_it_is(name: str, kind: str, tmp_path: Path) -> None:
    there = tmp_path / name
    content = there if kind == "file" else there / "report.json"
    content.parent.mkdir(exist_ok=True)
    content.write_text("precious")
    with pytest.raises(RunDirectoryError, match="exists already") as caught, RunDirectory(tmp_path / "one", needed=1):
        pytest.fail("was entered")
    assert str(there) in str(caught.value)
    assert "--out" in str(caught.value)
    assert content.read_text() == "precious"
    assert [p.name for p in tmp_path.iterdir()] == [name]


def test_nobody_takes_or_removes_the_directory_of_a_run_that_goes_on(tmp_path: Path) -> None:
    def refused(*, resume: bool = False) -> str:
        with (
            pytest.raises(RunDirectoryError, match=r"one\.partial exists already") as caught,
            RunDirectory(tmp_path / "one", needed=1, resume=resume),
        ):
            pytest.fail("was entered")
        return str(caught.value)

    with RunDirectory(tmp_path / "one", needed=1) as run:
        run.write("report.json", "{}")
        run.keep("train", {})
        for resume in (False, True):
            assert "choose another --out" in refused(resume=resume)
        discard(tmp_path / "one")
        assert (run.partial / "report.json").exists()
    assert "resume it with --resume" in refused()
    with RunDirectory(tmp_path / "one", needed=1, resume=True) as run:
        assert run.done == {"train": {}}
    discard(tmp_path / "one")
    assert list(tmp_path.iterdir()) == []


def test_too_little_room_is_said_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=3_000_000))
    with RunDirectory(tmp_path / "fits", needed=3_000_000) as run:
        run.finish()
    with (
        pytest.raises(RunDirectoryError, match=r"needs up to 2\.50 GB .* has 3 MB free"),
        RunDirectory(tmp_path / "too-large", needed=2_500_000_000),
    ):
        pytest.fail("was entered")
    assert [p.name for p in tmp_path.iterdir()] == ["fits"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_whatever_ends_a_run_leaves_nothing_of_it(error: type[BaseException], tmp_path: Path) -> None:
    def fail() -> None:
        with RunDirectory(tmp_path / "one", needed=1) as run:
            run.write("report.json", "{}")
            (run.partial / "spool").mkdir()
            run.record({"phase": "join"})
            raise error("stop")

    with pytest.raises(error):
        fail()
    assert list(tmp_path.iterdir()) == []


def fail(path: Path, error: BaseException, *, trained: bool, resume: bool = False, resumable: bool = True) -> None:
    """A run that somebody gives an account of, and that ends with an error."""
    with RunDirectory(path, needed=1, resume=resume, resumable=resumable) as run:
        run.account = lambda error, kept: {"report.json": json.dumps([str(error), kept]), "plan.toml": ""}
        run.write("layout.json", "{}")
        (run.partial / "spool").mkdir(exist_ok=True)
        run.record({"phase": "join"})
        if trained:
            run.keep("train", {})
        raise error


@pytest.mark.parametrize(("trained", "resumable"), [(False, True), (True, True), (True, False)])
def test_a_run_that_fails_leaves_its_report_and_a_later_one_takes_it_away(
    trained: bool, resumable: bool, tmp_path: Path
) -> None:
    failed, kept = tmp_path / "one.failed", trained and resumable
    for number, error in enumerate((FederationError("first"), RefusalError("second"))):
        with pytest.raises(type(error)) as caught:
            fail(tmp_path / "one", error, trained=trained, resume=kept and number > 0, resumable=resumable)
        assert caught.value.report == failed / "report.json"
        assert {path.name for path in failed.iterdir()} == {"plan.toml", "report.json", "transcript.jsonl"}
        assert json.loads((failed / "report.json").read_text()) == [str(error), kept]
        assert len((failed / "transcript.jsonl").read_text().splitlines()) == (2 if kept and number else 1)
        assert (tmp_path / "one.partial").exists() == kept
    with RunDirectory(tmp_path / "one", needed=1, resume=kept) as run:
        run.finish()
    assert [path.name for path in tmp_path.iterdir()] == ["one"]


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("a bug")], ids=["Ctrl-C", "bug"])
def test_whoever_stops_a_run_and_whatever_is_a_bug_leaves_no_report(error: BaseException, tmp_path: Path) -> None:
    with pytest.raises(type(error)):
        fail(tmp_path / "one", error, trained=False)
    assert list(tmp_path.iterdir()) == []


def test_a_directory_that_only_has_the_name_of_a_report_is_left_alone(tmp_path: Path) -> None:
    """Somebody may have called a run so."""
    with RunDirectory(tmp_path / "one.failed", needed=1) as run:
        run.write("report.json", "precious")
        run.finish()
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(FederationError, match="first") as caught:
        fail(tmp_path / "one", FederationError("first"), trained=False)
    assert caught.value.report is None
    assert sorted(tmp_path.rglob("*")) == before
    with RunDirectory(tmp_path / "one", needed=1) as run:
        run.finish()
    assert (tmp_path / "one.failed" / "report.json").read_text() == "precious"


def test_an_account_that_cannot_be_given_hides_no_error(tmp_path: Path) -> None:
    def broken(error: GramfuseError, kept: bool) -> dict[str, str]:
        raise KeyError(kept)

    def run_out() -> None:
        with RunDirectory(tmp_path / "one", needed=1) as run:
            run.account = broken
            raise FederationError("first")

    with pytest.raises(FederationError, match="first") as caught:
        run_out()
    assert caught.value.report is None
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("error", "kept"),
    [(e, True) for e in (FederationError, RefusalError, RunDirectoryError, RuntimeError, SystemExit, KeyboardInterrupt)]
    + [(e, False) for e in (ContributionError, SecurityError)],
)
def test_what_fails_after_training_can_be_resumed_unless_it_would_fail_again(
    error: type[BaseException], kept: bool, tmp_path: Path
) -> None:
    def fail() -> None:
        with RunDirectory(tmp_path / "one", needed=1) as run:
            run.keep("session", "ab" * 16)
            run.keep("train", {"silo-a": 3})
            run.record({"phase": "train"})
            raise error("stop")

    with pytest.raises(error):
        fail()
    assert [path.name for path in tmp_path.iterdir()] == (["one.partial"] if kept else [])
    if not kept:
        with (
            pytest.raises(RunDirectoryError, match="nothing to resume"),
            RunDirectory(tmp_path / "one", 1, resume=True),
        ):
            pytest.fail("was entered")
        return
    with pytest.raises(RunDirectoryError, match="--resume"), RunDirectory(tmp_path / "one", needed=1):
        pytest.fail("was entered")
    with RunDirectory(tmp_path / "one", needed=1, resume=True) as run:
        assert run.done == {"session": "ab" * 16, "train": {"silo-a": 3}}
        run.record({"phase": "upload"})
        path = run.finish()
    assert {file.name for file in path.iterdir()} == {"SHA256SUMS", "transcript.jsonl"}
    phases = [json.loads(line)["phase"] for line in (path / "transcript.jsonl").read_text().splitlines()]
    assert phases == ["train", "upload"]


GOOD = checkpoint_text({"session": "ab" * 16, "train": {"silo-a": {"examples": 3}}})
DAMAGED = {
    "cut off": GOOD[:-9],
    "empty": "",
    "no document": GOOD.partition("\n")[0],
    "one digit changed": GOOD.replace("3}", "4}"),
    "nested too deep": "[" * 200_000,
    "a number of 5,000 digits": "1" * 5_000,
    "of a version without a digest": GOOD.partition("\n")[2],
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_a_damaged_checkpoint_is_named_and_kept(tmp_path: Path, damage: str) -> None:
    (tmp_path / "one.partial").mkdir()
    file = tmp_path / "one.partial" / "checkpoint.json"
    file.write_text(DAMAGED[damage])
    with (
        pytest.raises(RunDirectoryError, match="cannot be read") as caught,
        RunDirectory(tmp_path / "one", 1, resume=True),
    ):
        pytest.fail("was entered")
    assert str(file) in str(caught.value)
    assert file.read_text() == DAMAGED[damage]


def test_a_name_taken_in_the_meantime_is_an_error_and_not_overwritten(tmp_path: Path) -> None:
    def race() -> None:
        with RunDirectory(tmp_path / "one", needed=1) as run:
            run.write("report.json", "{}")
            (tmp_path / "one").mkdir()
            (tmp_path / "one" / "report.json").write_text("theirs")
            run.finish()

    with pytest.raises(RunDirectoryError):
        race()
    assert [p.name for p in tmp_path.iterdir()] == ["one"]
    assert (tmp_path / "one" / "report.json").read_text() == "theirs"
    assert not (tmp_path / "one" / "SHA256SUMS").exists()


def test_a_parent_that_is_a_file_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("not a directory")
    with (
        pytest.raises(RunDirectoryError, match="cannot be created") as caught,
        RunDirectory(tmp_path / "runs" / "one", needed=1),
    ):
        pytest.fail("was entered")
    assert str(tmp_path / "runs" / "one") in str(caught.value)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 256 kB of its own."""
    mount, umount = shutil.which("mount"), shutil.which("umount")
    if mount is None or umount is None:
        pytest.skip("there is no mount command")
    disk = tmp_path / "disk"
    disk.mkdir()
    done = subprocess.run([mount, "-t", "tmpfs", "-o", "size=256k", "tmpfs", disk], capture_output=True, check=False)
    if done.returncode:
        pytest.skip("mounting a file system is not permitted")
    try:
        yield disk
    finally:
        subprocess.run([umount, disk], check=True)


def _text(run: RunDirectory) -> None:
    run.write("report.json", "x" * 1_000_000)


def _transcript(run: RunDirectory) -> None:
    for piece in range(1000):
        run.record({"phase": "upload", "piece": piece, "note": "x" * 1000})


def _tensors(run: RunDirectory) -> None:
    with run.writing():
        save_file({"weight": np.zeros(250_000, np.float32)}, run.partial / "model.safetensors")


def _sums(run: RunDirectory) -> None:
    free = shutil.disk_usage(run.partial).free
    (run.partial / "model.bin").write_bytes(b"\0" * free)
    run.finish()


@pytest.mark.parametrize("fill", [_text, _transcript, _tensors, _sums])
def test_a_disk_that_fills_up_is_an_error_and_nothing_stays(
    fill: Callable[[RunDirectory], None], small_disk: Path
) -> None:
    def run_out() -> None:
        with RunDirectory(small_disk / "one", needed=1) as run:
            run.record({"phase": "join"})
            fill(run)

    with pytest.raises(RunDirectoryError, match="no space left") as caught:
        run_out()
    assert str(small_disk / "one") in str(caught.value)
    assert list(small_disk.iterdir()) == []


@pytest.mark.parametrize("trained", [False, True])
def test_a_full_disk_leaves_the_report_if_there_is_room_once_the_rest_is_gone(trained: bool, small_disk: Path) -> None:
    def run_out() -> None:
        with RunDirectory(small_disk / "one", needed=1) as run:
            run.account = lambda error, kept: {"report.json": str(error) + "x" * 20_000}
            run.record({"phase": "join"})
            if trained:
                run.keep("train", {})
            with run.writing():
                (run.partial / "model.bin").write_bytes(b"\0" * 1_000_000)

    with pytest.raises(RunDirectoryError, match="no space left") as caught:
        run_out()
    report = small_disk / "one.failed" / "report.json"
    assert caught.value.report == (None if trained else report)
    assert [path.name for path in small_disk.iterdir()] == (["one.partial"] if trained else ["one.failed"])
    assert trained or report.read_text().startswith(str(caught.value))
