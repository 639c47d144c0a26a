"""Whatever is changed in what others send, its reader refuses it by name, or reads it."""

from __future__ import annotations

import random
import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, note, settings
from hypothesis import strategies as st

from gramfuse_protocol.errors import GramfuseError
from gramfuse_protocol.messages.phases import REQUESTS
from gramfuse_protocol.messages.wire import pack, unpack
from tests.adversarial.foreign_bytes.documents import ASKED, EVERY_REPLY, SAID, SECONDS
from tests.adversarial.foreign_bytes.readers import READERS

CASES = {
    "requests": 3000,
    "replies": 3000,
    "records": 2000,
    "npy": 2000,
    "layout": 2500,
    "plan": 2000,
    "silo file": 1500,
    "statistics file": 1500,
    "head file": 1500,
    "ledger": 1500,
    "checkpoint": 500,
    "transcript": 1000,
}
"""How many cases of each kind there are."""

BATCH = 50


def test_there_are_twenty_thousand_cases() -> None:
    assert sum(CASES.values()) >= 20_000


# Good documents


def test_every_phase_is_changed_below() -> None:
    assert {message.phase for message in ASKED} == set(REQUESTS)
    assert {message.phase for message in SAID} == set(EVERY_REPLY)
    for message in (*ASKED, *SAID):
        assert unpack(pack(message), REQUESTS if message in ASKED else EVERY_REPLY).phase == message.phase


# Readers: each makes a case from a seed, and reads it


@pytest.mark.parametrize("kind", CASES)
def test_nothing_that_is_read_breaks_its_reader(kind: str, tmp_path: Path) -> None:
    read, seen = READERS[kind], {"cases": 0, "read": 0, "slowest": 0.0, "longest": 0}

    @settings(
        max_examples=CASES[kind] // BATCH,
        derandomize=True,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(seed=st.binary(min_size=8, max_size=8))
    def batch(seed: bytes) -> None:
        for number in range(BATCH):
            draw = random.Random(seed + bytes([number]))
            began = time.process_time()
            try:
                read(draw, tmp_path)
                seen["read"] += 1
            except GramfuseError as error:
                seen["longest"] = max(seen["longest"], len(str(error)))
            except BaseException:
                note(f"case {number} of seed {seed.hex()}")
                raise
            took = time.process_time() - began
            assert took < SECONDS, f"case {number} of seed {seed.hex()} took {took:.1f} s"
            seen["cases"] += 1
            seen["slowest"] = max(seen["slowest"], took)

    batch()
    print(f"{kind}: {seen['cases']} cases, {seen['read']} of them still read, the slowest {seen['slowest']:.3f} s")
    assert seen["cases"] >= CASES[kind]
    assert seen["longest"] < 20_000  # characters of an error
    assert seen["read"] < seen["cases"] / 2  # the changes are changes
