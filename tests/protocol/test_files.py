"""A file is there whole or not at all, and private ones from their first moment."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from gramfuse_protocol.files import replacing


@pytest.fixture(autouse=True)
def _usual_mask() -> object:
    before = os.umask(0o022)
    yield
    os.umask(before)


@pytest.mark.parametrize("durable", [False, True])
def test_who_reads_while_it_is_written_sees_the_old_file_and_afterwards_the_new_one(
    tmp_path: Path, durable: bool
) -> None:
    path = tmp_path / "report.json"
    path.write_text("old")
    with replacing(path, private=True, durable=durable) as temporary:
        temporary.write_text("half of the")
        assert path.read_text() == "old"
        assert stat.S_IMODE(temporary.stat().st_mode) == 0o600
    assert path.read_text() == "half of the"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert [entry.name for entry in tmp_path.iterdir()] == ["report.json"]


@pytest.mark.parametrize("error", [OSError("no space left"), KeyboardInterrupt()])
def test_a_write_that_fails_leaves_the_old_file_and_nothing_beside_it(tmp_path: Path, error: BaseException) -> None:
    path = tmp_path / "report.json"
    path.write_text("old")

    def fail() -> None:
        with replacing(path, private=False) as temporary:
            temporary.write_text("half")
            raise error

    with pytest.raises(type(error)):
        fail()
    assert {entry.name: entry.read_text() for entry in tmp_path.iterdir()} == {"report.json": "old"}


def test_what_a_killed_process_left_open_to_all_does_not_pass_its_mode_on(tmp_path: Path) -> None:
    path = tmp_path / "secret"
    path.with_name("secret.partial").touch(mode=0o644)
    with replacing(path, private=True) as temporary:
        assert stat.S_IMODE(temporary.stat().st_mode) == 0o600


def test_a_new_file_never_replaces_one_that_another_process_made_meanwhile(tmp_path: Path) -> None:
    path = tmp_path / "copy.jsonl"

    def race() -> None:
        with replacing(path, private=True, new=True) as temporary:
            temporary.write_text("ours")
            path.write_text("theirs")

    with pytest.raises(FileExistsError):
        race()
    assert {entry.name: entry.read_text() for entry in tmp_path.iterdir()} == {"copy.jsonl": "theirs"}
