"""What the images, the compose demo and the systemd units promise, read from the files themselves."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
DOCKER = ROOT / "docker"
COMPOSE = yaml.safe_load((DOCKER / "compose.yaml").read_text(encoding="utf-8"))
HASHED = ("requirements.txt", "torch.txt", "torch-cpu.txt", "build.txt")


@pytest.mark.parametrize("name", COMPOSE["services"])
def test_every_service_is_confined(name: str) -> None:
    service: dict[str, Any] = COMPOSE["services"][name]
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges"]
    assert service["read_only"] is True
    assert 0 < service["pids_limit"] <= 1024
    assert re.fullmatch(r"[1-8]g", service["mem_limit"])
    assert all("size=" in mount for mount in service["tmpfs"])
    assert "privileged" not in service
    # Only the one that deals the demo out, and has no network, is root and may give files away.
    assert (service.get("network_mode") == "none") is (service["user"] == "root") is (name == "setup")
    assert service.get("cap_add", []) == (["CHOWN", "DAC_OVERRIDE", "FOWNER"] if name == "setup" else [])


def pins(text: str) -> dict[str, str]:
    found = re.findall(r"^([A-Za-z0-9._-]+)==([^\s;\\]+)", text, flags=re.M)
    return {re.sub(r"[-_.]+", "-", name).lower(): version for name, version in found}


@pytest.mark.parametrize("name", HASHED)
def test_all_that_the_images_install_is_pinned_by_version_and_hash(name: str) -> None:
    text = (DOCKER / name).read_text(encoding="utf-8")
    requirements = [part for part in re.split(r"\n(?=\S)", text) if not part.startswith("#")]
    assert requirements
    for requirement in requirements:
        pin, *hashes = (line.strip() for line in requirement.replace("\\\n", "\n").strip().splitlines())
        assert re.match(r"[A-Za-z0-9._-]+==\S+( ;.*)?", pin), pin
        assert hashes, pin
        assert all(re.fullmatch(r"--hash=sha256:[0-9a-f]{64}", line) for line in hashes), pin
    assert "://" not in text


def test_the_images_have_the_versions_that_are_tested() -> None:
    tested = pins((ROOT / "constraints.txt").read_text(encoding="utf-8"))
    installed = pins((DOCKER / "requirements.txt").read_text(encoding="utf-8"))
    torch, cpu = (pins((DOCKER / name).read_text(encoding="utf-8"))["torch"] for name in ("torch.txt", "torch-cpu.txt"))
    assert (torch, cpu) == (tested["torch"], f"{torch}+cpu")
    assert {name: tested[name] for name in installed if name in tested} == {
        name: version for name, version in installed.items() if name in tested
    }
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    asked = re.search(r"^dependencies = \[(.*?)^\]", project, flags=re.M | re.S)
    assert asked is not None
    names = set(re.findall(r'"([A-Za-z0-9_-]+)', asked[1])) - {"torch"}
    assert names <= installed.keys()


def test_the_dockerfile_installs_nothing_by_name() -> None:
    text = (DOCKER / "Dockerfile").read_text(encoding="utf-8").replace("\\\n", " ")
    installs = re.findall(r"pip install [^&\n]*", text)
    assert len(installs) == 4
    for install in installs:
        assert "--require-hashes" in install or "--no-index" in install, install


def units() -> dict[str, str]:
    """The two systemd units of docs/operations.md; the coordinator's is the silo's but for some lines."""
    text = (ROOT / "docs" / "operations.md").read_text(encoding="utf-8")
    section = text[text.index("## Under systemd") : text.index("## In containers")]
    silo, changes = re.findall(r"```ini\n(.*?)```", section, flags=re.S)
    server = silo
    for line in changes.splitlines():
        if "=" in line and not line.startswith("#"):
            key = re.escape(line.partition("=")[0])
            assert re.search(rf"^{key}=.*$", server, flags=re.M), f"{line}: the silo's unit has no such line"
            server = re.sub(rf"^{key}=.*$", line.replace("\\", r"\\"), server, flags=re.M)
    return {"gramfuse-silo.service": silo, "gramfuse-server.service": server}


HARDENED = {
    "NoNewPrivileges": "yes",
    "ProtectSystem": "strict",
    "ProtectHome": "yes",
    "PrivateTmp": "yes",
    "PrivateDevices": "yes",
    "UMask": "0077",
    "LimitCORE": "0",
    "CapabilityBoundingSet": "",
    "RestrictAddressFamilies": "AF_INET AF_INET6 AF_UNIX AF_NETLINK",
    "SystemCallFilter": "@system-service",
    "SystemCallErrorNumber": "EPERM",
    "ProtectProc": "invisible",
}


@pytest.mark.parametrize("name", units())
def test_a_unit_is_hardened_and_bounded(name: str, tmp_path: Path) -> None:
    unit = dict(line.split("=", 1) for line in units()[name].splitlines() if "=" in line and not line.startswith("#"))
    assert {key: unit.get(key) for key in HARDENED} == HARDENED
    assert {"MemoryMax", "TasksMax", "ReadWritePaths"} <= unit.keys()
    if shutil.which("systemd-analyze") is None:
        return
    for line in ("User=gramfuse", "Group=gramfuse"):  # there is no such user here
        assert line in units()[name]
    file = tmp_path / name
    text = units()[name].replace("=gramfuse\n", "=root\n").replace("/opt/gramfuse/bin/gramfuse", "/bin/true")
    file.write_text(text, encoding="utf-8")
    checked = subprocess.run(["systemd-analyze", "verify", file], capture_output=True, text=True)
    assert not [line for line in checked.stderr.splitlines() if name in line], checked.stderr
    file.write_text(units()[name], encoding="utf-8")
    command = ["systemd-analyze", "security", "--offline=yes", "--threshold=25", file]
    exposed = subprocess.run(command, capture_output=True, text=True)
    assert exposed.returncode == 0, exposed.stdout  # an exposure of 2.5 of 10 at most
