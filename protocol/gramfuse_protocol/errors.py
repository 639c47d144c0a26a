"""The errors that gramfuse raises, and the exit code of each.

    GramfuseError                 1   the root; never raised itself
    ├── PlanError                10   a plan or silo file that is missing or invalid
    ├── DataError                11   a silo's data that does not fit the plan
    ├── ModelError               12   a base model that cannot be loaded, or is not the plan's
    ├── RefusalError             13   a silo that declines what the coordinator asks of it
    ├── ContributionError        14   statistics that do not fit the layout, or hold NaN or Inf
    ├── RunDirectoryError        15   a run directory that exists already or cannot be written
    ├── FederationError          16   Flower, or a silo behind it, gave no valid answer
    ├── SecurityError            17   a message that breaks the secure sum's protocol
    ├── LedgerError              18   an egress ledger that is inconsistent, or cannot be written
    ├── CheckError               19   a silo that fails `gramfuse silo check`
    ├── FailureError             20   a silo that touched its data and failed
    └── MergeError               21   a merge that failed a check

docs/exit-codes/ has one page for each exit code.
"""

from __future__ import annotations

import errno
from pathlib import Path


class GramfuseError(Exception):
    """Base class of all errors that gramfuse raises.

    Example:
        >>> try:
        ...     gramfuse.read_statistics("missing.safetensors")
        ... except gramfuse.GramfuseError as error:
        ...     print(type(error).__name__, error.exit_code)
        ContributionError 14

    `str(error)` says what happened, where, what was expected and what to do. It may quote a silo's
    data or paths, so it never leaves the machine. Only `reason` is sent to the other side.

    Args:
        message: the full message, for the local log only.
        reason: the text that the other side receives; by default the class's `summary`, which quotes nothing.

    Attributes:
        report: path of the failed run's report, if one was written.
    """

    exit_code = 1
    report: Path | None = None
    summary = "gramfuse stopped"

    def __init__(self, message: str, *, reason: str | None = None) -> None:
        super().__init__(message)
        self.reason = reason if reason is not None else self.summary


class PlanError(GramfuseError):
    """A plan or silo file is missing or invalid."""

    exit_code = 10
    summary = "the silo file or the plan is missing or invalid"


class DataError(GramfuseError):
    """A silo's data does not fit the plan."""

    exit_code = 11
    summary = "the silo's data does not fit the plan"


class ModelError(GramfuseError):
    """The base model cannot be loaded, or is not the plan's."""

    exit_code = 12
    summary = "the base model cannot be loaded, or is not the plan's"


class RefusalError(GramfuseError):
    """A silo declines what the coordinator asks of it."""

    exit_code = 13
    summary = "the silo refused"


class ContributionError(GramfuseError):
    """Statistics do not fit the layout, or hold values that are not finite.

    Its message is also its reason. A silo that finds such a fault in its own statistics sends a FailureError instead.
    """

    exit_code = 14

    def __init__(self, message: str) -> None:
        super().__init__(message, reason=message)


class RunDirectoryError(GramfuseError):
    """A run directory exists already, or cannot be written."""

    exit_code = 15
    summary = "the run directory cannot be written"


class FederationError(GramfuseError):
    """Flower, or a silo behind it, gave no valid answer."""

    exit_code = 16
    summary = "the federation gave no valid answer"


class SecurityError(GramfuseError):
    """A message breaks the protocol of the secure sum: forged, replayed, contradictory, or beyond what is allowed.

    Its message is also its reason: it names silos and phases, and contains no secret.
    """

    exit_code = 17

    def __init__(self, message: str) -> None:
        super().__init__(message, reason=message)


class LedgerError(GramfuseError):
    """A silo's egress ledger is inconsistent, or cannot be written."""

    exit_code = 18
    summary = "the silo cannot write its ledger, so nothing leaves"


class CheckError(GramfuseError):
    """A silo failed its dry run (`gramfuse silo check`)."""

    exit_code = 19
    summary = "the silo is not ready"


class FailureError(GramfuseError):
    """A silo touched its data, or its own state, and failed.

    Args:
        message: what happened, for the silo's own log.
        phase: phase of the request. The other side reads the same text whatever went wrong in it.
    """

    exit_code = 20
    summary = "the silo failed; its own log has the reason"

    def __init__(self, message: str, *, phase: str = "") -> None:
        super().__init__(
            message, reason=f"this silo failed in phase {phase}; its own log has the reason" if phase else None
        )


class MergeError(GramfuseError):
    """A merge failed a check: a silo's training diverged, or a silo did not send what it measured."""

    exit_code = 21
    summary = "the merge failed a check"


def error_types() -> dict[str, type[GramfuseError]]:
    """Return all error classes below the root by name, as refusals and JSON output name them."""
    return {cls.__name__: cls for cls in GramfuseError.__subclasses__()}


def disk_is_full(error: BaseException) -> bool:
    """Return whether an exception means that the disk is full.

    Rust libraries set no errno: safetensors raises its own error type, tokenizers a bare Exception.
    """
    if isinstance(error, OSError):
        return error.errno in (errno.ENOSPC, errno.EDQUOT)
    if type(error) is Exception:
        return str(error).endswith((f"(os error {errno.ENOSPC})", f"(os error {errno.EDQUOT})"))
    return type(error).__name__ == "SafetensorError" and "No space left on device" in str(error)
