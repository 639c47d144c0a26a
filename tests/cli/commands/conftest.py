"""`gramfuse` in this process, with all that `main` does, in a working directory of the test."""

from __future__ import annotations

import os
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from gramfuse_cli.main import main
from tests.cli.commands.outcomes import Outcome


@pytest.fixture
def gramfuse(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Iterator[Callable[..., Outcome]]:
    """Return a function that runs a command in this process, as the console script does."""
    before = signal.getsignal(signal.SIGTERM)

    def run(*arguments: str | Path) -> Outcome:
        monkeypatch.setattr(sys, "argv", ["gramfuse", *map(str, arguments)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as caught:
            main()
        stdout, stderr = capfd.readouterr()
        assert isinstance(caught.value.code, int)
        return Outcome(caught.value.code, stdout, stderr)

    yield run
    signal.signal(signal.SIGTERM, before)


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The working directory, and a directory for temporary files, which is empty afterwards; Ray's paths are short."""
    with tempfile.TemporaryDirectory() as temporary:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setenv("TMPDIR", temporary)
        monkeypatch.setattr(tempfile, "tempdir", None)
        yield tmp_path
        assert os.listdir(temporary) == []
