"""A silo's own `flwr-clientapp`: it holds what Flower's would unpack and run, and knows the Flower that it can hold."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path

import pytest

from gramfuse_client import worker
from gramfuse_client.app import SiloApp
from gramfuse_protocol.errors import FederationError


def test_the_installed_flower_is_one_that_it_can_hold() -> None:
    worker.check_flower()


@pytest.mark.parametrize("name", [*worker.REPLACED, *worker.REPLACED_IN_RUNNER])
def test_a_flower_that_changed_is_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module = worker.run_clientapp if name in worker.REPLACED else worker.run_superexec
    monkeypatch.setattr(module, name, lambda something_else: None)
    with pytest.raises(FederationError, match=name):
        worker.check_flower()
    monkeypatch.delattr(module, name)
    with pytest.raises(FederationError, match=name):
        worker.check_flower()


@pytest.mark.parametrize("version", ["1.40.1", "1.43.0", "1.4.1", "2.41.0"])
def test_another_version_of_flower_is_refused(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.metadata, "version", lambda name: version)
    with pytest.raises(FederationError, match=rf"Flower {version} .*1\.41\.\* and 1\.42\.\*"):
        worker.check_flower()


@pytest.mark.parametrize("version", ["1.41.0", "1.41.7", "1.42.0"])
def test_two_versions_of_flower_are_known(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.metadata, "version", lambda name: version)
    worker.check_flower()


def test_nothing_of_a_bundle_is_unpacked_or_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLWR_HOME", str(tmp_path / "flwr"))
    for name in worker.REPLACED:  # so that they are put back
        monkeypatch.setattr(worker.run_clientapp, name, getattr(worker.run_clientapp, name))
    loaded = []

    def flwr_clientapp() -> None:
        """What Flower's worker does with a message, in its order."""
        worker.run_clientapp.install_from_fab(b"a bundle", skip_prompt=True)
        path = worker.run_clientapp.get_project_dir("thief/app", "../..", "00")
        worker.run_clientapp.install_app_dependencies(path, launch_id="token", run_id=1, index_context={})
        load = worker.run_clientapp.get_load_client_app_fn(default_app_ref="", app_path=None, multi_app=True)
        loaded.append(load("thief/app", "1.0.0", "00"))

    monkeypatch.setattr(worker, "flwr_clientapp", flwr_clientapp)
    worker.main()
    (app,) = loaded
    assert type(app) is SiloApp
    assert app._bundle == b"a bundle"
    assert list(tmp_path.iterdir()) == []
