"""A silo's `flwr-clientapp`: Flower's own worker, but it runs the installed gramfuse and nothing that a run brings.

A silo's SuperExec (`gramfuse_client.runner`) starts this for each message. The stock worker unpacks the run's app
bundle, puts it in front of what is installed, and runs it. This one hands the bundle's bytes to `SiloApp`, which checks
them, and loads nothing. All private functions of Flower that are replaced, here and in the runner, are listed here;
`check_flower` finds out at start-up whether they still are what they were.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gramfuse_client.app import SiloApp
from gramfuse_protocol.errors import FederationError

# Flower's packages re-export functions under their modules' names, so the modules are named in full.
command = importlib.import_module("flwr.supernode.cli.flwr_clientapp")
runtime = importlib.import_module("flwr.supernode.runtime.run_clientapp")
superexec: Any = importlib.import_module("flwr.supercore.superexec.run_superexec")

VERSIONS = ("1.41.", "1.42.")

REPLACED = {
    "install_from_fab": ["fab_file", "install_dir", "skip_prompt"],
    "get_project_dir": ["fab_id", "fab_version", "fab_hash"],
    "install_app_dependencies": ["project_dir", "launch_id", "run_id", "index_context"],
    "get_load_client_app_fn": ["default_app_ref", "app_path", "multi_app"],
}
"""Functions that Flower's worker calls, and the parameters that they had in VERSIONS."""

REPLACED_IN_RUNNER = {"get_executor": ["executor_type", "executor_config", "insecure", "root_certificates_path"]}
"""The same of Flower's SuperExec."""


def check_flower() -> None:
    """Raise FederationError if the installed Flower is not one that this worker knows how to hold."""
    version = importlib.metadata.version("flwr")
    changed = [
        name
        for module, functions in ((runtime, REPLACED), (superexec, REPLACED_IN_RUNNER))
        for name, parameters in functions.items()
        if list(inspect.signature(getattr(module, name, lambda: None)).parameters) != parameters
    ]
    if not version.startswith(VERSIONS) or changed:
        known = " and ".join(f"{one}*" for one in VERSIONS)
        raise FederationError(
            f"Flower {version} is installed and differs from {known} in {', '.join(changed) or 'its version'}; the "
            f"silo runs nothing with it. Install: flwr=={VERSIONS[-1]}*"
        )


class _Held:
    """Stands in for all that the stock worker does with a bundle: keeps its bytes for the app to check."""

    def __init__(self) -> None:
        self.bundle = b""

    def install_from_fab(self, fab_file: bytes, **_: Any) -> Path:
        """Unpack nothing."""
        self.bundle = fab_file
        return Path()

    def get_project_dir(self, *_: str) -> Path:
        """There is no such directory."""
        return Path()

    def install_app_dependencies(self, *_: Any, **__: Any) -> None:
        """Install nothing, even if Flower was told to."""

    def get_load_client_app_fn(self, **_: Any) -> Callable[[str, str, str], SiloApp]:
        """Load the installed app, whatever the bundle names."""
        return lambda *_: SiloApp(bundle=self.bundle)


def main() -> None:
    """Answer one message, as `flwr-clientapp` does."""
    check_flower()
    held = _Held()
    for name in REPLACED:
        setattr(runtime, name, getattr(held, name))
    command.flwr_clientapp()


if __name__ == "__main__":
    main()
