"""The compose demo as its users start it; and with five silos, of which one is killed in the middle."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
RUNS = ROOT / "runs"
COMPOSE = ["docker", "compose", "--file", str(ROOT / "docker" / "compose.yaml")]


def has_engine() -> bool:
    """Whether a Docker engine answers."""
    try:
        return subprocess.run(["docker", "info"], capture_output=True, timeout=60).returncode == 0
    except OSError:
        return False


pytestmark = pytest.mark.skipif(not has_engine(), reason="there is no Docker engine")


def docker(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=900, env=environment()).stdout


def environment(**more: str) -> dict[str, str]:
    owner = {"GRAMFUSE_UID": str(os.getuid() or 1000), "GRAMFUSE_GID": str(os.getgid() or 1000)}
    # Who has torch's CPU build here has an index with it, and the images are spared CUDA.
    torch = {"TORCH": "torch-cpu"} if version("torch").endswith("+cpu") else {}
    return {**torch, **os.environ, **owner, **more}


def containers() -> dict[str, dict[str, Any]]:
    """Return what the engine says of each service's container."""
    ids = docker(*COMPOSE, "--profile", "five", "ps", "--all", "--quiet").split()
    found = json.loads(docker("docker", "inspect", *ids)) if ids else []
    return {container["Config"]["Labels"]["com.docker.compose.service"]: container for container in found}


@pytest.fixture
def clean() -> Iterator[set[Path]]:
    """Begin and end without containers and volumes; returns the runs that were there before."""
    down = [*COMPOSE, "--profile", "five", "down", "--volumes", "--timeout", "5"]
    docker(*down)
    RUNS.mkdir(exist_ok=True)
    yield set(RUNS.iterdir())
    docker(*down)


def merged(before: set[Path]) -> dict[str, Any]:
    """Return the report of the one run that came about, after a look at its model."""
    (run,) = set(RUNS.iterdir()) - before
    script = (
        "import sys; from transformers import AutoModelForSequenceClassification as A; "
        "print(A.from_pretrained(sys.argv[1]).config.num_labels)"
    )
    done = subprocess.run([sys.executable, "-c", script, str(run / "model")], capture_output=True, text=True)
    assert done.stdout.strip() == "8", done.stderr
    report: dict[str, Any] = json.loads((run / "report.json").read_text())
    return report


def mounted(container: dict[str, Any]) -> set[str]:
    return {mount.get("Name") or mount["Source"] for mount in container["Mounts"]}


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_make_compose_leaves_a_merged_model(clean: set[Path]) -> None:
    done = subprocess.run(
        ["make", "compose"], cwd=ROOT, capture_output=True, text=True, timeout=1400, env=environment()
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    report = merged(clean)
    assert report["mode"] == "secure"
    assert len(report["silos"]) == 4
    assert report["lost"] == []
    assert next(m for m in report["models"] if m["kind"] == "regmean")["metrics"]["accuracy"] > 0.6

    found = containers()
    assert {name: c["State"]["ExitCode"] for name, c in found.items()} == dict.fromkeys(found, 0)
    silos = {name: c for name, c in found.items() if name.startswith("flower-client")}
    for name, container in (silos | {"flower-server": found["flower-server"]}).items():
        assert container["Config"]["User"].split(":")[0] not in ("", "0", "root"), name
        assert container["Config"]["Healthcheck"]["Test"], name
    for name, container in found.items():
        limits = container["HostConfig"]
        assert limits["ReadonlyRootfs"], name
        assert limits["CapDrop"] == ["ALL"], name
        assert limits["CapAdd"] == (["CHOWN", "DAC_OVERRIDE", "FOWNER"] if name == "setup" else None), name
        assert limits["SecurityOpt"] == ["no-new-privileges"], name
        assert (limits["PidsLimit"], limits["Memory"]) == (512, 4 * 2**30), name
    for name, container in silos.items():
        (network,) = container["NetworkSettings"]["Networks"]
        sharing = {n for n, c in found.items() if network in c["NetworkSettings"]["Networks"]}
        assert sharing == {name, "flower-server"}
        for other, another in found.items():
            if other not in (name, "setup"):
                assert not mounted(container) & mounted(another)


@pytest.mark.timeout(1500)
def test_one_of_five_silos_is_killed_and_the_others_merge(clean: set[Path]) -> None:
    log = [*COMPOSE, "--profile", "five", "logs", "--no-color", "flower-server"]
    fewer = environment(SILOS="5", COMPOSE_PROFILES="five", EPOCHS="1", GRACE="20")
    with subprocess.Popen(
        ["make", "compose"], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=fewer
    ) as up:
        try:
            deadline = time.monotonic() + 1200
            while "silos exchange keys" not in docker(*log):  # all five have trained
                assert up.poll() is None, docker(*log)
                assert time.monotonic() < deadline, docker(*log)
                time.sleep(1)
            docker("docker", "kill", containers()["flower-client-5"]["Id"])
            assert up.wait(900) == 0, docker(*log)
        finally:
            up.terminate()
    found = containers()
    assert found["flower-server"]["State"]["ExitCode"] == 0, docker(*log)
    report = merged(clean)
    assert len(report["silos"]) == 4
    assert [silo["name"] for silo in report["lost"]] == ["library"]
    assert {found[f"flower-client-{n}"]["State"]["ExitCode"] for n in (1, 2, 3, 4)} == {0}
