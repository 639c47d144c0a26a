"""Bases of immutable models that are parsed strictly."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict

from gramfuse_protocol.text import Legible


class Frozen(BaseModel):
    """A frozen model; unknown keys are refused, types are strict, and errors do not quote values."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, hide_input_in_errors=True)


class LegibleFrozen(Frozen, Legible):
    """A frozen model of printable text."""
