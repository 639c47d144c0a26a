"""Every error that gramfuse raises on purpose, and the exit code that each one ends a command with.

    GramfuseError                 1   the root; never raised itself
    ├── PlanError                10   a plan or silo file that cannot be used as it is
    ├── DataError                11   a silo's data that does not fit the plan
    ├── ModelError               12   a base model that cannot be had, or is not the plan's
    ├── RefusalError             13   a silo that declines what the coordinator asks of it
    ├── ContributionError        14   statistics that do not fit the layout, or hold NaN or Inf
    ├── RunDirectoryError        15   a run directory that exists already or cannot be written
    ├── FederationError          16   Flower, or a silo behind it, did not answer as it must
    ├── SecurityError            17   a message that breaks the secure sum's protocol
    ├── LedgerError              18   an egress ledger that does not hold together, or cannot be written
    ├── CheckError               19   a silo that is not ready, as `gramfuse silo check` finds
    ├── FailureError             20   a silo that touched its data and failed
    └── MergeError               21   a merge of which a check is bad

One page for each exit code stands in docs/exit-codes/.
"""

from __future__ import annotations

import errno
from pathlib import Path


class GramfuseError(Exception):
    """Root of the tree.

    Example:
        >>> try:
        ...     gramfuse.read_statistics("missing.safetensors")
        ... except gramfuse.GramfuseError as error:
        ...     print(type(error).__name__, error.exit_code)
        ContributionError 14

    `str(error)` says what happened, where, what was expected and what to do. It may quote a silo's
    data or paths, so it stays where it was raised. What crosses to the other side is `reason`.

    Args:
        message: the whole story, for whoever owns the files that it names.
        reason: what the other side may read; by default the class's `summary`, which quotes nothing.

    Attributes:
        report: the report of the run that it ended, if one was left.
    """

    exit_code = 1
    report: Path | None = None
    summary = "gramfuse stopped"

    def __init__(self, message: str, *, reason: str | None = None) -> None:
        super().__init__(message)
        self.reason = reason if reason is not None else self.summary


class PlanError(GramfuseError):
    """A plan or silo file cannot be used as it is."""

    exit_code = 10
    summary = "the silo file or the plan cannot be used as it is"


class DataError(GramfuseError):
    """A silo's data does not fit the plan."""

    exit_code = 11
    summary = "the silo's data does not fit the plan"


class ModelError(GramfuseError):
    """The base model cannot be loaded, or is not the one that the plan names."""

    exit_code = 12
    summary = "the base model cannot be loaded, or is not the one of the plan"


class RefusalError(GramfuseError):
    """A silo declines what the coordinator asks of it."""

    exit_code = 13
    summary = "the silo refused"


class ContributionError(GramfuseError):
    """Statistics do not fit the layout, or hold values that are not finite.

    Its messages are the reason too: what a silo finds in its own statistics is a FailureError to the other side.
    """

    exit_code = 14

    def __init__(self, message: str) -> None:
        super().__init__(message, reason=message)


class RunDirectoryError(GramfuseError):
    """A run directory exists already, or cannot be written."""

    exit_code = 15
    summary = "the run directory cannot be written"


class FederationError(GramfuseError):
    """Flower, or a silo behind it, did not answer as it must."""

    exit_code = 16
    summary = "the federation did not answer as it must"


class SecurityError(GramfuseError):
    """A message breaks the protocol of the secure sum: forged, replayed, contradictory, or beyond what is allowed.

    Its messages name silos, phases and what was expected, and hold no secret, so they are the reason too.
    """

    exit_code = 17

    def __init__(self, message: str) -> None:
        super().__init__(message, reason=message)


class LedgerError(GramfuseError):
    """A silo's egress ledger does not hold together, or cannot be written."""

    exit_code = 18
    summary = "the silo cannot write its ledger, so nothing leaves"


class CheckError(GramfuseError):
    """A silo is not ready to take part, as its dry run found."""

    exit_code = 19
    summary = "the silo is not ready"


class FailureError(GramfuseError):
    """A silo touched its data, or its own state, and failed.

    Args:
        message: what happened, for the silo's own log.
        phase: of the request. The other side reads one text for each phase, whatever happened.
    """

    exit_code = 20
    summary = "the silo failed; its own log has the reason"

    def __init__(self, message: str, *, phase: str = "") -> None:
        super().__init__(
            message, reason=f"this silo failed in phase {phase}; its own log has the reason" if phase else None
        )


class MergeError(GramfuseError):
    """A merge of which a check is bad: a silo's training diverged, or a silo did not send what it measured."""

    exit_code = 21
    summary = "a check of the merge is bad"


def error_types() -> dict[str, type[GramfuseError]]:
    """Return the leaves of the tree by class name, as they are named in refusals and in JSON."""
    return {cls.__name__: cls for cls in GramfuseError.__subclasses__()}


def disk_is_full(error: BaseException) -> bool:
    """Whether an exception says that the disk has no space left.

    Libraries in Rust raise what has no errno: safetensors an error of its own, tokenizers a bare Exception.
    """
    if isinstance(error, OSError):
        return error.errno in (errno.ENOSPC, errno.EDQUOT)
    if type(error) is Exception:
        return str(error).endswith((f"(os error {errno.ENOSPC})", f"(os error {errno.EDQUOT})"))
    return type(error).__name__ == "SafetensorError" and "No space left on device" in str(error)
