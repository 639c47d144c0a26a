"""The Flower app that is sent around: configuration, no code, the same bytes for the same plan."""

from __future__ import annotations

import importlib
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp

from gramfuse_deployment.flower_run import write_app
from gramfuse_model.project import Project
from gramfuse_protocol.contract.layout import Layout
from gramfuse_protocol.contract.plan import Plan


def test_the_bundle_holds_configuration_only(tmp_path: Path, pico_project: Callable[..., Any]) -> None:
    plan, layout = Project.read(pico_project(silos=2).directory).locked()
    for name in ("first", "second"):
        write_app(tmp_path / name, plan, layout)
    assert [path.name for path in (tmp_path / "first").rglob("*")] == ["pyproject.toml"]
    written = (tmp_path / "first" / "pyproject.toml").read_bytes()
    assert written == (tmp_path / "second" / "pyproject.toml").read_bytes()

    app = tomllib.loads(written.decode())["tool"]["flwr"]["app"]
    assert Plan.parse(app["config"]["plan"]).digest == plan.digest
    assert Layout.parse(app["config"]["layout"]).digest == layout.digest
    for component, kind in (("serverapp", ServerApp), ("clientapp", ClientApp)):
        module, _, attribute = app["components"][component].partition(":")
        assert isinstance(getattr(importlib.import_module(module), attribute), kind)
