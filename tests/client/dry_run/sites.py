"""A silo that has all that it needs, the proxy that it dials, and what a check finds there."""

from __future__ import annotations

import ssl
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

from cryptography import x509

from gramfuse_client.dry_run.check import DryRun, check
from gramfuse_deployment.certificates import Authority, certificate_pem, key_pem, new_key
from gramfuse_model.project import Project
from gramfuse_protocol.contract.plan import Plan

NAME = "silo-a"
YEAR = timedelta(days=365)


@dataclass
class Coordinator:
    """A coordinator's proxy, as far as a check sees it. All of it can be changed while it runs.

    Args:
        statuses: by path; 404 for others.
        ahead: how far its clock is.
        dated: whether it tells its time.
        asked: the paths that were asked for.
    """

    directory: Path
    authority: Authority
    port: int = 0
    statuses: dict[str, int] = field(default_factory=dict)
    ahead: timedelta = timedelta()
    dated: bool = True
    asked: list[str] = field(default_factory=list)
    context: ssl.SSLContext = field(default_factory=lambda: ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER))

    def certify(
        self, names: list[x509.GeneralName], begin: datetime, days: int, authority: Authority | None = None
    ) -> None:
        """Show another certificate from now on."""
        key = new_key()
        certificate = (authority or self.authority).certify(key.public_key(), names, begin, days)
        (self.directory / "server.crt").write_bytes(certificate_pem(certificate))
        (self.directory / "server.key").write_bytes(key_pem(key))
        self.context.load_cert_chain(self.directory / "server.crt", self.directory / "server.key")


@dataclass
class Site:
    """A project that is locked and approved by a silo that has all that it needs."""

    project: Any
    silo: Path
    plan: Plan

    def edit(self, old: str, new: str) -> None:
        self.project.replace(self.silo, old, new)

    def lock(self) -> None:
        """Lock the plan anew, and approve it."""
        project = Project.read(self.project.directory)
        plan, layout = Project(project.directory, project.plan.unlocked()).locked()
        project.write_lock(plan, layout)
        self.edit(self.plan.digest, plan.digest)
        self.plan = plan

    def check(self, **options: Any) -> DryRun:
        return check(self.silo, self.project.directory, **options)


def tree(directory: Path) -> dict[str, tuple[float, bytes | None]]:
    return {
        str(path): (path.stat().st_mtime, path.read_bytes() if path.is_file() else None)
        for path in directory.rglob("*")
    }


def problems(report: DryRun) -> dict[str, str]:
    """What stands in the way, by subject: what was found, and what to do."""
    found = report.findings.problems
    assert all(finding.remedy for finding in found)
    return {finding.subject: f"{finding.what}\n{finding.remedy}" for finding in found}


def finding(report: DryRun, subject: str) -> Any:
    (found,) = [finding for finding in report.findings if finding.subject == subject]
    return found
