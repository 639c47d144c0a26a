"""How long a coordinator waits for silos."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any


@dataclass(frozen=True)
class Patience:
    """How long a run waits for silos, from the command to the delivery of each message.

    Args:
        wait: seconds for all silos to be connected; then the run goes on with those that are there, if the plan
            allows it.
        answer: seconds after which a silo that is connected and did not answer is given up; 0 never gives up.
        grace: seconds after which a silo that went away is given up. Flower keeps a SuperNode that crashed out for up
            to a minute, until it takes the one before for dead. It only counts where nodes are authenticated: without a
            key, a node that comes back is another node.
        authenticated: whether Flower knows each node by its key, which the plan then has; otherwise the coordinator
            takes a node's own word for which silo it is.
    """

    wait: float = 600.0
    answer: float = 0.0
    grace: float = 180.0
    authenticated: bool = False

    @staticmethod
    def from_run(config: Mapping[str, Any]) -> Patience:
        """Return what a run's configuration says, as `to_config` wrote it."""
        wait, answer, grace = (float(config[key]) for key in ("wait", "answer", "grace"))
        return Patience(wait, answer, grace, authenticated=bool(config["authenticated"]))

    def to_config(self) -> dict[str, Any]:
        """Return it as the values of a Flower app's configuration."""
        return asdict(self)

    def for_long_work(self) -> Patience:
        """Return it for work that may take any time, such as training: a silo that is connected is not given up."""
        return replace(self, answer=0.0)

    def allowed(self, *, away: bool) -> float | None:
        """Return the seconds after which a silo is given up, or None for never.

        Args:
            away: whether it is not connected.
        """
        if away:
            return self.grace if self.authenticated else 0.0
        return self.answer or None
