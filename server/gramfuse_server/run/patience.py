"""How long a coordinator waits for silos."""

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
