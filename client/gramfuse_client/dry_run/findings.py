"""What a silo's dry run finds, and what to do about it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from gramfuse_protocol.errors import GramfuseError


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Args:
        subject: in a word or two.
        state: `skipped` if it could not be looked at, or was not to be.
        what: what was found.
        remedy: what to do about it, a command or an edit where there is one; with `ok` it is good to know, no more.
    """

    subject: str
    state: Literal["ok", "problem", "skipped"]
    what: str
    remedy: str = ""


class Findings(list[Finding]):
    """What was found so far, in order."""

    @property
    def problems(self) -> list[Finding]:
        """What keeps the silo from taking part."""
        return [finding for finding in self if finding.state == "problem"]

    def ok(self, subject: str, what: str, notice: str = "") -> None:
        """Note that something is as it must be."""
        self.append(Finding(subject, "ok", what, notice))

    def problem(self, subject: str, what: str, remedy: str) -> None:
        """Note what keeps the silo from taking part."""
        self.append(Finding(subject, "problem", what, remedy))

    def skip(self, subject: str, why: str) -> None:
        """Note what was not looked at."""
        self.append(Finding(subject, "skipped", why))

    def error(self, subject: str, error: GramfuseError, remedy: str = "") -> None:
        """Note an error as a problem: what comes after the first semicolon of its message is what to do."""
        what, _, own = str(error).partition("; ")
        self.problem(subject, what, "\n".join(filter(None, (own, remedy))))
