"""The roster of a secure sum, and how many silos it takes.

With n silos, of which the coordinator may have c on its side, and a threshold of t shares:

* the coordinator must not get t shares of each of two kinds for one silo by telling different stories to different
  silos, so 2t > n + c;
* a merge shows the sum of at least t silos' statistics, so the plan's minimum of survivors is at least t;
* n − t silos may drop out.

Source: Bonawitz et al., "Practical Secure Aggregation for Privacy-Preserving Machine Learning", CCS 2017, theorem 6.5,
for a coordinator that lies.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from gramfuse_protocol.bounds import SILOS


@dataclass(frozen=True)
class Roster:
    """Who may be in a secure sum, and on what terms.

    Args:
        plan: SHA-256 of the plan, 64 hexadecimal digits; in a round after the first what stands for it
            (`gramfuse_protocol.secure_sum.statements.round_digest`).
        keys: Ed25519 public key (32 bytes) of each silo by name, in the plan's order.
        threshold: t, the shares that bring a secret back.
        minimum: fewest silos that a sum may be of.
    """

    plan: str
    keys: Mapping[str, bytes]
    threshold: int
    minimum: int

    @property
    def names(self) -> tuple[str, ...]:
        """The silos, in the plan's order."""
        return tuple(self.keys)

    @property
    def floor(self) -> int:
        """Fewest silos that a step of the protocol may go on with."""
        return max(self.threshold, self.minimum)

    def index(self, name: str) -> int:
        """Return where a silo's shares are taken: its place in the roster, from 1."""
        return self.names.index(name) + 1


def smallest_threshold(silos: int, colluding: int) -> int:
    """Return the smallest t with 2t > n + c."""
    return (silos + colluding) // 2 + 1


def tolerated(silos: int, threshold: int, minimum: int) -> dict[str, int]:
    """Return how many silos may drop out of a secure sum on safe terms, and how many may collude."""
    return {"dropouts": silos - max(threshold, minimum), "colluding": min(2 * threshold - silos - 1, minimum - 2)}


def check_terms(silos: int, colluding: int, threshold: int, minimum: int) -> None:
    """Raise ValueError, saying what to change, unless a secure sum on these terms keeps its promise."""
    if silos < 3:
        raise ValueError(
            f"secure aggregation of {silos} silos hides nothing: each could subtract its own part from the sum; "
            "it takes three at least, and four if one of them may drop out"
        )
    if silos > SILOS:
        raise ValueError(f"secure aggregation takes at most {SILOS} silos; the roster names {silos}")
    needed = smallest_threshold(silos, colluding)
    if needed > silos:
        raise ValueError(
            f"'privacy.colluding' = {colluding} of {silos} silos cannot be withstood: 2·threshold > silos + colluding "
            f"asks for a threshold of {needed}; lower 'privacy.colluding' or add silos"
        )
    if threshold < needed:
        raise ValueError(
            f"'privacy.threshold' = {threshold} is not safe with {silos} silos and {colluding} colluding: a "
            "coordinator that lies about who dropped out could open one silo's contribution; "
            f"set it to {needed} or more"
        )
    if threshold > silos:
        raise ValueError(f"'privacy.threshold' = {threshold} is more than the {silos} silos of the roster")
    if minimum < threshold:
        raise ValueError(
            f"'privacy.minimum-survivors' = {minimum} is below the threshold of {threshold}; raise it, or leave it out"
        )
    if silos - colluding < 2:
        raise ValueError(
            f"'privacy.colluding' = {colluding} of {silos} silos would leave a single honest silo in every sum; "
            "lower it or add silos"
        )
    if minimum - colluding < 2:
        raise ValueError(
            f"'privacy.minimum-survivors' = {minimum} with {colluding} colluding silos would leave a single honest "
            "silo in the sum; raise it"
        )
    if minimum > silos:
        raise ValueError(f"'privacy.minimum-survivors' = {minimum} is more than the {silos} silos of the roster")
