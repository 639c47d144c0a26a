"""Checks a run's app bundle (Flower's FAB), which is never unpacked or executed.

A bundle made by `gramfuse run` is a zip file with Flower's manifest and `pyproject.toml`, which contains the run's
plan. A silo runs only its installed gramfuse; a bundle with anything else was not made by `gramfuse run`.
"""

from __future__ import annotations

import hashlib
import io
import tomllib
import zipfile
from typing import Any

from gramfuse_client.silo_file import Silo
from gramfuse_protocol.contract.plan import Plan
from gramfuse_protocol.errors import GramfuseError, RefusalError

MANIFEST = ".info/CONTENT"
CONFIGURATION = "pyproject.toml"
COMPONENTS = {"serverapp": "gramfuse_server.app:app", "clientapp": "gramfuse_client.app:app"}
MOST_BYTES = 64 * 2**20
"""Maximum size of each file, unpacked; a layout has some hundred bytes per tensor."""


def check_bundle(silo: Silo, content: bytes) -> None:
    """Raise RefusalError unless a bundle contains only configuration, for a plan that the silo has approved.

    Args:
        content: the bundle's bytes. They are untrusted: anyone who can push a run to the SuperLink chooses them.
    """
    digest = hashlib.sha256(content).hexdigest()
    try:
        plan = _plan(content)
    except (ValueError, KeyError, TypeError, GramfuseError, zipfile.BadZipFile, NotImplementedError, RuntimeError) as e:
        raise RefusalError(
            f"the run's app bundle (SHA-256 {digest}) was not made by gramfuse: {e}; nothing in it was unpacked or run",
            reason="the app bundle is not one of gramfuse's, which carry no code",
        ) from None
    if plan.digest not in silo.file.approved:
        raise RefusalError(
            f"{silo.path}: the run's app bundle is for plan {plan.digest}, which is not approved here; read the plan, "
            "then add the digest to 'approved'",
            reason="this silo has not approved the plan",
        )


def _plan(content: bytes) -> Plan:
    with zipfile.ZipFile(io.BytesIO(content)) as bundle:
        files = bundle.infolist()
        names = sorted(file.filename for file in files)
        if names != [MANIFEST, CONFIGURATION]:
            shown = ", ".join(name for name in names if name not in (MANIFEST, CONFIGURATION))
            raise ValueError(f"it contains {shown[:200]!r}, but only {CONFIGURATION} and {MANIFEST} are allowed")
        if any(file.file_size > MOST_BYTES for file in files):
            raise ValueError(f"one of its files is larger than {MOST_BYTES} bytes")
        app: dict[str, Any] = tomllib.loads(bundle.read(CONFIGURATION).decode("utf-8"))["tool"]["flwr"]["app"]
    if app["components"] != COMPONENTS:
        raise ValueError(f"its components are {app['components']!r:.200}, not gramfuse's")
    return Plan.parse(app["config"]["plan"], "the plan in the app bundle")
