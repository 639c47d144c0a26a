"""The models of a test."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.client.checkpoints.models import Models


@pytest.fixture
def models(pico_bert: Path, tmp_path: Path) -> Models:
    return Models(pico_bert, tmp_path)
