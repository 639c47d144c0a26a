"""Trains the silos of a project, or loads them from the cache. A statistics file also contains the trained model."""

from __future__ import annotations

import hashlib
import os
import shutil
import time
from collections.abc import Sequence
from pathlib import Path

from gramfuse_client.exchange.offline import contribute
from gramfuse_client.silo_file import read_silos
from gramfuse_client.state.state import State
from gramfuse_model.project import Project
from gramfuse_protocol.contract.layout import Layout
from gramfuse_protocol.contract.plan import Plan
from gramfuse_protocol.statistics.file import StatisticsFile, read_statistics
from gramfuse_simulation.all_silos import AllSilos
from gramfuse_simulation.engine import simulated_silo
from projects import Setting, write


def laboratory(setting: Setting, name: str, cache: Path, settings: Sequence[str] = ()) -> tuple[AllSilos, float]:
    """Return a laboratory with all trained silos of a setting, and the seconds that their training took.

    Every silo fine-tunes and measures with the code of `gramfuse measure --plan`, whose statistics equal those of a run
    bit for bit. Results are cached by the digest of plan, data and base model.

    Args:
        name: of the plan.
        cache: directory of trained silos; can be removed between runs.
        settings: `section.key=value` overrides of the plan.
    """
    project = Project.read(_cached_project(setting, name, cache), settings)
    plan, layout = project.locked()
    place = project.directory.parent / plan.digest
    place.mkdir(exist_ok=True)
    files = {name: _cached_statistics(project, plan, layout, name, place) for name in plan.names}
    seconds = sum(float((place / f"{name}.seconds").read_text()) for name in files)
    silos = {
        name: simulated_silo(str(silo.path), str(place), plan.digest)
        for name, silo in read_silos(project.directory, plan.names).items()
    }
    heads = {name: file.own() for name, file in files.items()} if plan.model.head == "own" else {}
    return AllSilos(plan, layout, project.directory, silos, files, heads), seconds


def _cached_project(setting: Setting, name: str, cache: Path) -> Path:
    """Write a project into the cache, by the digest of all its files, unless it is there; return its path."""
    cache.mkdir(parents=True, exist_ok=True)
    temporary = write(cache / f"{name}.{os.getpid()}.partial", setting, name=name)
    total = hashlib.sha256()
    for path in sorted(path for path in temporary.rglob("*") if path.is_file()):
        total.update(f"{path.relative_to(temporary)}\n".encode() + hashlib.sha256(path.read_bytes()).digest())
    place = cache / f"{name}-{total.hexdigest()[:16]}"
    place.mkdir(exist_ok=True)
    if (place / "project").exists():
        shutil.rmtree(temporary)
    else:
        temporary.rename(place / "project")
    return place / "project"


def _cached_statistics(project: Project, plan: Plan, layout: Layout, name: str, place: Path) -> StatisticsFile:
    path = place / f"{name}.safetensors"
    if not path.exists():
        began = time.monotonic()
        silo = simulated_silo(str(project.directory / "silos" / f"{name}.toml"), str(place), plan.digest, opened=True)
        temporary = path.with_suffix(".partial")
        temporary.unlink(missing_ok=True)
        state = State(silo.state, plan.digest)
        contribute(silo, plan, layout, temporary, state)
        shutil.rmtree(state.directory)  # the file contains all of it
        path.with_suffix(".seconds").write_text(f"{time.monotonic() - began:.1f}\n", encoding="ascii")
        temporary.rename(path)
    return read_statistics(path)
