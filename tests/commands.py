"""`gramfuse` in the process of the test."""

from __future__ import annotations

import json
from typing import Any

from click.testing import CliRunner

from gramfuse_cli.main import cli
from gramfuse_protocol.errors import GramfuseError


def gramfuse(*arguments: Any) -> dict[str, Any]:
    """Run a command in this process and return its JSON; what it raises is raised here."""
    result = CliRunner().invoke(cli, [*map(str, arguments), "--json"])
    if isinstance(result.exception, GramfuseError):
        raise result.exception
    assert result.exit_code == 0, f"{result.output} {result.exception!r}"
    report: dict[str, Any] = json.loads(result.stdout)
    return report
