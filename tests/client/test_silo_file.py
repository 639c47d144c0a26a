"""The silo file: whose files are whose, and hours that are none."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from gramfuse_client.silo_file import Silo
from gramfuse_protocol.errors import PlanError

COORDINATOR = '[coordinator]\naddress = "merge.example.org:9092"\n'


def read(path: Path, head: str = "", tail: str = "") -> Silo:
    """Write a silo file, of what it needs and what is given, and read it."""
    path.write_text(f'name = "north"\n{head}\n[data]\ntrain = "t.jsonl"\nheld-out = 0.2\n{tail}')
    return Silo.read(path)


def own(silo: Silo) -> list[Path]:
    return [silo.identity_path, silo.node_key_path, silo.state, silo.ledger]


@pytest.mark.parametrize("tail", ["", COORDINATOR], ids=["no coordinator", "coordinator"])
def test_two_silo_files_in_one_directory_share_nothing(tail: str, tmp_path: Path) -> None:
    north, south = (read(tmp_path / name, tail=tail) for name in ("north.toml", "south-2.1.toml"))
    assert own(north) == [tmp_path / p for p in ("north.pem", "north.key", "north.state", "north.state/ledger.jsonl")]
    assert not set(own(north)) & set(own(south))
    assert south.identity_path == tmp_path / "south-2.1.pem"


def test_what_the_silo_file_names_is_taken_and_starts_at_its_directory(tmp_path: Path) -> None:
    head = f'identity = "../i"\nstate = "{tmp_path / "s"}"'
    (tmp_path / "silos").mkdir()
    silo = read(tmp_path / "silos" / "north.toml", head, f'{COORDINATOR}node-key = "keys/n.key"\nca = "../ca.crt"')
    assert own(silo) == [tmp_path / p for p in ("i", "silos/keys/n.key", "s", "s/ledger.jsonl")]
    assert silo.ca_path == tmp_path / "ca.crt"


@pytest.mark.parametrize(
    "hours",
    [
        '"20:00"',
        '"24:00-06:00"',
        '"20:60-06:00"',
        '"8:00-17:00"',
        '"20:00 - 06:00"',
        '"20:00-06:00\\n"',
        '"20:00-0\u0666:00"',
        '"20:00-20:00"',
        "20",
        "20:00:00",
        '["20:00-06:00"]',
    ],
)
def test_what_are_no_hours_is_refused_naming_file_and_key(hours: str, tmp_path: Path) -> None:
    path = tmp_path / "north.toml"
    with pytest.raises(PlanError) as caught:
        read(path, tail=f"[limits]\ntrain-hours = {hours}")
    (line,) = str(caught.value).splitlines()
    assert line.startswith(f"{path}: 'limits.train-hours': ")
    assert "expected hours such as 20:00-06:00" in line or "20:00-20:00" in line


@pytest.mark.parametrize("hours", ["20:00-06:00", "00:00-23:59"])
def test_hours_are_written_as_they_were_read(hours: str, tmp_path: Path) -> None:
    silo = read(tmp_path / "north.toml", tail=f"[limits]\ntrain-hours = {json.dumps(hours)}")
    assert str(silo.file.limits.train_hours) == hours


@pytest.mark.parametrize(
    "address",
    [
        "a:0",
        "a:65536",
        "a:99999",
        "-a:1",
        "--root-certificates:1",
        "a:1\\n",
        "a b:1",
        "a",
        "a:",
        ":1",
        "[::1%x]:1",
        "a;b:1",
    ],
)
def test_an_address_that_is_none_is_refused(address: str, tmp_path: Path) -> None:
    with pytest.raises(PlanError, match=r"coordinator\.address"):
        read(tmp_path / "north.toml", "", f'[coordinator]\naddress = "{address}"\n')


def test_a_plan_in_place_of_a_silo_file_is_called_one(tmp_path: Path) -> None:
    path = tmp_path / "plan.toml"
    path.write_text('[plan]\nname = "small"\n[model]\nbase = "b"\n[[silo]]\nname = "north"\n', encoding="utf-8")
    with pytest.raises(PlanError, match=r"plan\.toml: looks like a plan"):
        Silo.read(path)
