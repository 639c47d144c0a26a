"""The roster of a secure sum, and the conditions on its size and threshold.

With n silos, c of which may collude with the coordinator, and a threshold of t shares:

* a coordinator that tells silos different lists of survivors must not obtain t shares of both secrets of one silo, so
  2t > n + c;
* a merge reveals the sum of at least t silos' statistics, so the plan's minimum of survivors is at least t;
* up to n − t silos may drop out.

Source: Bonawitz et al., "Practical Secure Aggregation for Privacy-Preserving Machine Learning", CCS 2017, theorem 6.5,
for a malicious coordinator.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from gramfuse_protocol.bounds import SILOS


@dataclass(frozen=True)
class Roster:
    """The possible members of a secure sum, and its terms.

    Args:
        plan: SHA-256 of the plan, 64 hexadecimal digits; after the first round, its
            `gramfuse_protocol.secure_sum.statements.round_digest`.
        keys: Ed25519 public key (32 bytes) of each silo by name, in the plan's order.
        threshold: t, the number of shares that reconstruct a secret.
        minimum: minimum number of silos in a sum.
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
        """Minimum number of silos for each step of the protocol."""
        return max(self.threshold, self.minimum)

    def index(self, name: str) -> int:
        """Return the evaluation point of a silo's shares: its position in the roster, counted from 1."""
        return self.names.index(name) + 1


def smallest_threshold(silos: int, colluding: int) -> int:
    """Return the smallest t with 2t > n + c."""
    return (silos + colluding) // 2 + 1


def tolerated(silos: int, threshold: int, minimum: int) -> dict[str, int]:
    """Return how many silos may drop out of a secure sum, and how many may collude, for safe terms."""
    return {"dropouts": silos - max(threshold, minimum), "colluding": min(2 * threshold - silos - 1, minimum - 2)}


def check_terms(silos: int, colluding: int, threshold: int, minimum: int) -> None:
    """Raise ValueError, saying what to change, unless a secure sum on these terms is safe."""
    if silos < 3:
        raise ValueError(
            f"secure aggregation of {silos} silos hides nothing: each could subtract its own part from the sum; "
            "use at least three, or four if one may drop out"
        )
    if silos > SILOS:
        raise ValueError(f"secure aggregation takes at most {SILOS} silos; the roster names {silos}")
    needed = smallest_threshold(silos, colluding)
    if needed > silos:
        raise ValueError(
            f"'privacy.colluding' = {colluding} is too many for {silos} silos: 2·threshold > silos + colluding "
            f"requires a threshold of {needed}; lower 'privacy.colluding' or add silos"
        )
    if threshold < needed:
        raise ValueError(
            f"'privacy.threshold' = {threshold} is not safe with {silos} silos and {colluding} colluding: a "
            "coordinator that lies about who dropped out could open one silo's contribution; "
            f"set it to {needed} or more"
        )
    if threshold > silos:
        raise ValueError(f"'privacy.threshold' = {threshold} is more than the {silos} silos in the roster")
    if minimum < threshold:
        raise ValueError(
            f"'privacy.minimum-survivors' = {minimum} is below the threshold of {threshold}; raise it or omit it"
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
        raise ValueError(f"'privacy.minimum-survivors' = {minimum} is more than the {silos} silos in the roster")
