"""Findings of a silo's dry run, and what to do about them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from gramfuse_protocol.errors import GramfuseError


@dataclass(frozen=True)
class Finding:
    """The result of one check.

    Args:
        subject: what was checked, in a word or two.
        state: `skipped` if the check could not run, or was not wanted.
        what: the finding.
        remedy: what to do about it, as a command or an edit if possible; with `ok`, only for information.
    """

    subject: str
    state: Literal["ok", "problem", "skipped"]
    what: str
    remedy: str = ""


class Findings(list[Finding]):
    """The findings so far, in order."""

    @property
    def problems(self) -> list[Finding]:
        """The findings that prevent the silo from taking part."""
        return [finding for finding in self if finding.state == "problem"]

    def ok(self, subject: str, what: str, notice: str = "") -> None:
        """Add a check that passed."""
        self.append(Finding(subject, "ok", what, notice))

    def problem(self, subject: str, what: str, remedy: str) -> None:
        """Add a problem that prevents the silo from taking part."""
        self.append(Finding(subject, "problem", what, remedy))

    def skip(self, subject: str, why: str) -> None:
        """Add a check that was skipped."""
        self.append(Finding(subject, "skipped", why))

    def error(self, subject: str, error: GramfuseError, remedy: str = "") -> None:
        """Add an error as a problem; the part of its message after the first semicolon is the remedy."""
        what, _, advice = str(error).partition("; ")
        self.problem(subject, what, "\n".join(filter(None, (advice, remedy))))
