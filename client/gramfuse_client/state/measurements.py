"""Stores a silo's measurements under one plan: each candidate model once per round, and the held-out examples' digest.

It stores exactly the values that leave, including noise, so that a repeated request gets the same answer. The digest of
a round's merged model also determines what the next round can start from.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from gramfuse_protocol.contract.plan_sections import Sha256
from gramfuse_protocol.files import write_private
from gramfuse_protocol.frozen import Frozen


class Measurement(Frozen):
    """The measurement of one model.

    Args:
        model: its digest (`gramfuse_protocol.secure_sum.statements.model_digest`).
        words: this silo's summand in the secure sum of metrics; empty if there is no such sum.
        sums: held-out sums that leave in the clear; empty if none do.
    """

    model: Sha256
    words: tuple[int, ...] = ()
    sums: tuple[float, ...] = ()


class HeldOut(Frozen):
    """The held-out examples measured on.

    Args:
        data: digest of the held-out examples; empty before the first measurement.
        rows: digest of their rows (`gramfuse_client.guard.releases.Releases.keep_rows`); empty without a secure sum.
    """

    data: str = ""
    rows: str = ""


class _Stored(Frozen):
    held_out: HeldOut = HeldOut()
    rounds: Mapping[int, Mapping[str, Measurement]] = {}


class Measurements:
    """The measurements under one plan.

    Args:
        path: the file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def held_out(self) -> HeldOut:
        """Return the held-out examples measured on.

        Raises:
            ValueError: if the file is damaged; so do all methods.
        """
        return self._read().held_out

    def of(self, number: int) -> Mapping[str, Measurement]:
        """Return the measurements of round `number` by candidate."""
        return self._read().rounds.get(number, {})

    def keep(self, number: int, candidate: str, measurement: Measurement, held_out: HeldOut | None = None) -> None:
        """Store a measurement.

        Args:
            number: the round.
            held_out: the examples that it was measured on; None if nothing was measured.
        """
        stored = self._read()
        rounds = {**stored.rounds, number: {**stored.rounds.get(number, {}), candidate: measurement}}
        stored = _Stored(held_out=held_out or stored.held_out, rounds=rounds)
        write_private(self.path, stored.model_dump_json().encode(), durable=True)

    def _read(self) -> _Stored:
        try:
            return _Stored.model_validate_json(self.path.read_bytes())
        except FileNotFoundError:
            return _Stored()
