"""How long a coordinator waits for silos, and how often it tries: all of the retry policy."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any


@dataclass(frozen=True)
class Patience:
    """How long a run waits for silos, from the command to the delivery of each message.

    Args:
        wait: seconds to wait for all silos to connect; then the run continues with those that did, if the plan allows
            it.
        answer: seconds after which a connected silo that has not answered is given up; 0 for never.
        grace: seconds after which a disconnected silo is given up. Flower refuses a SuperNode that crashed for up to a
            minute, until it considers the old connection dead. Applies only if nodes are authenticated: without a key,
            a node that reconnects is a new node.
        authenticated: whether Flower knows each node by its key, which is then in the plan; otherwise the coordinator
            trusts a node's own claim which silo it is.
    """

    wait: float = 600.0
    answer: float = 0.0
    grace: float = 180.0
    authenticated: bool = False

    @staticmethod
    def from_run(config: Mapping[str, Any]) -> Patience:
        """Read it from a run's configuration, as `to_config` wrote it."""
        wait, answer, grace = (float(config[key]) for key in ("wait", "answer", "grace"))
        return Patience(wait, answer, grace, authenticated=bool(config["authenticated"]))

    def to_config(self) -> dict[str, Any]:
        """Return it as values for a Flower app's configuration."""
        return asdict(self)

    def for_long_work(self) -> Patience:
        """Return it for work of any length, such as training: a connected silo is never given up."""
        return replace(self, answer=0.0)

    def allowed(self, *, away: bool) -> float | None:
        """Return the seconds after which a silo is given up, or None for never.

        Args:
            away: whether the silo is disconnected.
        """
        if away:
            return self.grace if self.authenticated else 0.0
        return self.answer or None


DEFAULT = Patience()

FINISH = Patience(answer=60.0)
"""For silos to confirm that they wiped the session; the result does not depend on it."""

ATTEMPTS = 3
"""How often a request is sent, if Flower loses it or its reply."""

LOOK_SECONDS = 5.0
"""Seconds between checks whether an awaited node was restarted."""

REMINDER_SECONDS = 60.0
"""Seconds after which an observer is reminded of a silo that has not answered; then twice that, and so on."""

FIRST_PAUSE, LONGEST_PAUSE = 0.02, 1.0
"""Seconds between looks for replies; the pause grows while none arrives, since each look is a request to Flower."""
