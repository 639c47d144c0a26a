"""The base class of all parts of report.json: reading, writing and updating.

The file contains exactly the keys that were set when the part was constructed, including those set to null.
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
        """Parse a JSON object; raises ValidationError if it is invalid."""
        return cls.model_validate_json(json.dumps(document), by_alias=True, by_name=False)

    def document(self) -> dict[str, Any]:
        """Return the JSON object, with the keys that were set."""
        return self.model_dump(mode="json", by_alias=True, exclude_unset=True)

    def updated(self, **changes: Any) -> Self:
        """Return a copy with some keys changed; raises ValidationError as construction does."""
        return type(self)(**{name: getattr(self, name) for name in self.model_fields_set} | changes)

    def has(self, key: str) -> bool:
        """Whether the report has a key, even if its value is null."""
        return key in self.model_fields_set
