"""What all parts of report.json have in common, and the whole of it: how they are read, written and changed.

A key is in the file if whoever wrote the report gave it a value, which may be null: `ReportPart.document` leaves out
all others.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Self

from pydantic import BaseModel, ConfigDict


class ReportPart(BaseModel):
    """A frozen part of a report; unknown keys are refused, and types are strict."""

    model_config = ConfigDict(
        frozen=True,
        strict=True,
        extra="forbid",
        validate_by_name=True,
        ser_json_inf_nan="constants",
        use_attribute_docstrings=True,
    )

    @classmethod
    def read(cls, document: Mapping[str, Any]) -> Self:
        """Return the part that a JSON object holds; raises ValidationError if it is none."""
        return cls.model_validate_json(json.dumps(document), by_alias=True, by_name=False)

    def document(self) -> dict[str, Any]:
        """Return the JSON object, with the keys that were given."""
        return self.model_dump(mode="json", by_alias=True, exclude_unset=True)

    def updated(self, **changes: Any) -> Self:
        """Return the part with other values of some keys; raises ValidationError as construction does."""
        return type(self)(**{name: getattr(self, name) for name in self.model_fields_set} | changes)

    def has(self, key: str) -> bool:
        """Whether the report has a value of a key, which may be null."""
        return key in self.model_fields_set
