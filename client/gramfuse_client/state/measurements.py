"""What a silo measured under one plan: each of the plan's candidates once a round, and on which held-out examples.

What is kept is what leaves, noise included, so that the same question gets the same answer however often it comes. The
merged model of a round is also what the next round may start from.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from gramfuse_protocol.contract.plan_sections import Sha256
from gramfuse_protocol.files import write_private


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, hide_input_in_errors=True)


class Measurement(_Frozen):
    """One model.

    Args:
        model: its digest (`gramfuse_protocol.secure_sum.statements.model_digest`).
        words: what this silo adds to the secure sum of metrics; empty where there is none.
        sums: what leaves in the clear; empty where nothing does.
    """

    model: Sha256
    words: tuple[int, ...] = ()
    sums: tuple[float, ...] = ()


class HeldOut(_Frozen):
    """What was measured on.

    Args:
        data: digest of the held-out examples; empty before the first measurement.
        rows: what their rows are kept by (`gramfuse_client.guard.releases.Releases.keep_rows`); empty without a secure
            sum.
    """

    data: str = ""
    rows: str = ""


class _Kept(_Frozen):
    held_out: HeldOut = HeldOut()
    rounds: Mapping[int, Mapping[str, Measurement]] = {}


class Measurements:
    """The measurements under one plan.

    Args:
        path: where they are kept.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def held_out(self) -> HeldOut:
        """Return what was measured on.

        Raises:
            ValueError: if the file is damaged, as from all methods.
        """
        return self._read().held_out

    def of(self, number: int) -> Mapping[str, Measurement]:
        """Return the measurements of a round by candidate."""
        return self._read().rounds.get(number, {})

    def keep(self, number: int, candidate: str, measurement: Measurement, held_out: HeldOut | None = None) -> None:
        """Keep a measurement.

        Args:
            number: of the round.
            held_out: what it was measured on, if anything was measured.
        """
        kept = self._read()
        rounds = {**kept.rounds, number: {**kept.rounds.get(number, {}), candidate: measurement}}
        kept = _Kept(held_out=held_out or kept.held_out, rounds=rounds)
        write_private(self.path, kept.model_dump_json().encode(), durable=True)

    def _read(self) -> _Kept:
        try:
            return _Kept.model_validate_json(self.path.read_bytes())
        except FileNotFoundError:
            return _Kept()
