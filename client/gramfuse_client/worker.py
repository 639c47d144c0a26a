"""A silo's `flwr-clientapp`: Flower's worker, changed to run only the installed gramfuse and no code from a run.

A silo's SuperExec (`gramfuse_client.runner`) starts it for each message. The stock worker unpacks the run's app bundle,
puts it on `sys.path` before the installed packages, and runs it. This one loads nothing from the bundle; it passes the
bundle's bytes to `SiloApp`, which checks them. This module lists all private functions of Flower that it and the runner
replace; `check_flower` verifies their signatures at start-up.
"""

from __future__ import annotations

import importlib.metadata
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

from flwr.supercore.superexec import run_superexec
from flwr.supernode.cli import flwr_clientapp
from flwr.supernode.runtime import run_clientapp

from gramfuse_client.app import SiloApp
from gramfuse_protocol.errors import FederationError

VERSIONS = ("1.41.", "1.42.")

REPLACED = {
    "install_from_fab": ["fab_file", "install_dir", "skip_prompt"],
    "get_project_dir": ["fab_id", "fab_version", "fab_hash"],
    "install_app_dependencies": ["project_dir", "launch_id", "run_id", "index_context"],
    "get_load_client_app_fn": ["default_app_ref", "app_path", "multi_app"],
}
"""Functions of Flower's worker to replace, and their parameters in VERSIONS."""

REPLACED_IN_RUNNER = {"get_executor": ["executor_type", "executor_config", "insecure", "root_certificates_path"]}
"""The same for Flower's SuperExec."""


def check_flower() -> None:
    """Raise FederationError if this worker does not support the installed version of Flower."""
    version = importlib.metadata.version("flwr")
    changed = [
        name
        for module, functions in ((run_clientapp, REPLACED), (run_superexec, REPLACED_IN_RUNNER))
        for name, parameters in functions.items()
        if list(inspect.signature(getattr(module, name, lambda: None)).parameters) != parameters
    ]
    if not version.startswith(VERSIONS) or changed:
        supported = " and ".join(f"{prefix}*" for prefix in VERSIONS)
        raise FederationError(
            f"Flower {version} is installed and differs from {supported} in {', '.join(changed) or 'its version'}; the "
            f"silo does not run with it. Install: flwr=={VERSIONS[-1]}*"
        )


class _BundleKeeper:
    """Replaces the stock worker's handling of a bundle: only keeps its bytes, for the app to check."""

    def __init__(self) -> None:
        self.bundle = b""

    def install_from_fab(self, fab_file: bytes, **_: Any) -> Path:
        """Keep the bundle; unpack nothing."""
        self.bundle = fab_file
        return Path()

    def get_project_dir(self, *_: str) -> Path:
        """Return a placeholder: no directory was unpacked."""
        return Path()

    def install_app_dependencies(self, *_: Any, **__: Any) -> None:
        """Install nothing, even if Flower is configured to."""

    def get_load_client_app_fn(self, **_: Any) -> Callable[[str, str, str], SiloApp]:
        """Load the installed app, whatever the bundle names."""
        return lambda *_: SiloApp(bundle=self.bundle)


def main() -> None:
    """Answer one message, as `flwr-clientapp` does."""
    check_flower()
    keeper = _BundleKeeper()
    for name in REPLACED:
        setattr(run_clientapp, name, getattr(keeper, name))
    flwr_clientapp()


if __name__ == "__main__":
    main()
