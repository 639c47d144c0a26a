"""A session, and another one of the same silos."""

from __future__ import annotations

import pytest

from tests.adversarial.state_machine.stage import OTHER_NONCE, Stage


@pytest.fixture(scope="module")
def at() -> Stage:
    return Stage()


@pytest.fixture(scope="module")
def elsewhere() -> Stage:
    """Another session of the same silos under the same plan."""
    return Stage(nonce=OTHER_NONCE, seed=2)
