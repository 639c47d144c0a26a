"""Deals the compose demo out: to the coordinator its certificate and the locked plan, to each silo its data and keys.

Each call starts anew. Runs once, as root and without a network, before the others; who mounts what is in compose.yaml.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

DESKS = ["hospital", "bank", "telephone", "town-hall"]
FIFTH = "library"
OWNER = int(os.environ["GRAMFUSE_UID"]), int(os.environ["GRAMFUSE_GID"])
SERVER = "flower-server"
PORT = 9443


def gramfuse(*arguments: str | Path) -> str:
    """Run a command of gramfuse and return what it prints."""
    command = ["gramfuse", *map(str, arguments)]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


def empty(directory: Path) -> None:
    """Take away what an earlier deal left in a volume."""
    for path in directory.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def deal_fifth(project: Path) -> None:
    """Give a fifth silo every fifth message of the others, which they then do not have."""
    (project / "data" / FIFTH).mkdir()
    for name in ("train.jsonl", "held-out.jsonl"):
        taken = []
        for desk in DESKS:
            file = project / "data" / desk / name
            rows = file.read_text(encoding="utf-8").splitlines(keepends=True)
            taken += rows[::5]
            file.write_text("".join(row for n, row in enumerate(rows) if n % 5), encoding="utf-8")
        (project / "data" / FIFTH / name).write_text("".join(taken), encoding="utf-8")


def silo_file(name: str, approved: str = "") -> str:
    """Return what the operator of a silo would write."""
    digests = f'"{approved}"' if approved else ""
    return f"""name = "{name}"
threads = 1
approved = [{digests}]

[data]
train = "data/train.jsonl"
held-out = "data/held-out.jsonl"

[coordinator]
address = "{SERVER}:{PORT}"
ca = "ca.crt"
"""


def main() -> None:
    """Deal."""
    names = [*DESKS, FIFTH][: int(os.environ["SILOS"])]
    scratch = Path(tempfile.mkdtemp())
    project, pki, coordinator, plan = scratch / "project", scratch / "pki", Path("/coordinator"), Path("/plan")
    homes = {name: Path(f"/silo-{number}") for number, name in enumerate(names, 1)}
    for directory in (coordinator, plan, *homes.values()):
        empty(directory)
    gramfuse("init", project)
    if FIFTH in names:
        deal_fifth(project)
    gramfuse("pki", "init", pki, "--host", SERVER)
    gramfuse("pki", "server", pki)
    for file in ("ca.crt", "server.crt", "server.key"):  # the authority's own key goes away with this container
        shutil.copy2(pki / file, coordinator)

    roster = ""
    for name, home in homes.items():
        shutil.copytree(project / "data" / name, home / "data")
        shutil.copy2(pki / "ca.crt", home)
        (home / "silo.toml").write_text(silo_file(name), encoding="utf-8")
        roster += "\n" + gramfuse("silo", "keygen", home / "silo.toml")
    terms = (project / "plan.toml").read_text(encoding="utf-8")
    terms = re.sub(r"^epochs = .*$", f"epochs = {int(os.environ['EPOCHS'])}", terms, flags=re.M)
    head = re.split(r"^\[\[silo\]\]", terms, maxsplit=1, flags=re.M)[0]
    (plan / "plan.toml").write_text(head + roster, encoding="utf-8")
    digest = json.loads(gramfuse("plan", "lock", plan, "--json"))["plan_digest"]
    for name, home in homes.items():
        (home / "silo.toml").write_text(silo_file(name, digest), encoding="utf-8")

    for directory in (coordinator, plan, *homes.values(), Path("/runs")):
        os.chown(directory, *OWNER)
    for directory in (coordinator, plan, *homes.values()):
        directory.chmod(0o700)
        for path in directory.rglob("*"):
            os.chown(path, *OWNER)
    print(f"dealt: plan {digest} for {', '.join(names)}")


if __name__ == "__main__":
    main()
