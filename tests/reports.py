"""Reports of runs, as tests read them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from gramfuse_server.report.page.view import read_report


def read_back(run: Path) -> dict[str, Any]:
    """Return the report in a run directory; it must say the same when it is written again."""
    report = read_report(run / "report.json")
    text = (run / "report.json").read_text(encoding="utf-8")
    assert report.text == text
    document: dict[str, Any] = json.loads(text)
    return document
