"""What the coordinator's own disk did to an interrupted run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from flwr.app import RecordDict
from safetensors.numpy import save

from gramfuse_protocol.errors import ContributionError
from gramfuse_server.run.spool import Spool
from gramfuse_server.run_directory import partial_of
from tests.adversarial.hostile_silo.runs import NAMES, B, D, Federation, Lie, Run, Stopped

DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "cut off": lambda data: data[: len(data) // 2],
    "empty": lambda data: b"",
    "one bit": lambda data: data[:-5] + bytes([data[-5] ^ 1]) + data[-4:],
    "a header of gigabytes": lambda data: b"\xff" * 8 + data[8:],
    "a file of somebody else's": lambda data: save({"masked": np.zeros(8, "<u8")}),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_piece_is_as_one_that_never_came(tmp_path: Path, damage: str) -> None:
    Spool(tmp_path).save(D, 0, {"masked": np.arange(8, dtype="<u8")})
    (path,) = (tmp_path / D).iterdir()
    path.write_bytes(DAMAGE[damage](path.read_bytes()))
    found = Spool(tmp_path)
    assert not found.has(D, 0)
    assert not path.exists()
    found.save(D, 0, {"masked": np.arange(8, dtype="<u8")})
    assert Spool(tmp_path).has(D, 0)


@pytest.mark.parametrize("stop", ["masked", "survivors"])
def test_a_damaged_piece_is_asked_for_again(federation: Federation, tmp_path: Path, stop: str) -> None:
    run = Run(federation, tmp_path / "place")
    if stop == "masked":  # after some of the pieces came
        run.phase, run.lie = "masked", _stops(after=3)
    with pytest.raises(Stopped):
        run.go(stop="" if stop == "masked" else stop)
    run.phase = ""
    (spooled,) = (partial_of(run.out) / "spool" / D).glob("000001.*")
    spooled.write_bytes(DAMAGE["one bit"](spooled.read_bytes()))
    before = run.asked[D, "masked"]
    report = run.go(resume=True)
    assert [silo["name"] for silo in report["silos"]] == list(NAMES)
    assert report["lost"] == []
    assert report["unmeasured"] is None
    if stop == "survivors":
        assert run.asked[D, "masked"] == before + 1 + 1  # the piece, and the metrics


def _stops(after: int) -> Lie:
    count = 0

    def lie(_: Run, reply: RecordDict) -> RecordDict:
        nonlocal count
        count += 1
        if count > after:
            raise Stopped
        return reply

    return lie


def test_a_piece_that_its_silo_has_no_longer_ends_the_run_once_and_for_all(
    federation: Federation, tmp_path: Path
) -> None:
    run = Run(federation, tmp_path / "place")
    with pytest.raises(Stopped):
        run.go(stop="merge")  # the silos released their shares, and their vectors are gone
    (spooled,) = (partial_of(run.out) / "spool" / B).glob("000000.*")
    spooled.write_bytes(b"")
    with pytest.raises(ContributionError, match=r"'silo-b' .*(?s:.*)start a new"):
        run.go(resume=True)
    assert not partial_of(run.out).exists()
