"""Two silos whose data differ in one record are asked the same; outside of their masked vectors they answer the same.

The coordinator goes through every phase, honestly and not: it sends models that give no number, or overflow, for a word
of that record, asks out of order and again, in other sessions, rounds and plans, and after failures. Every message
finds a silo that was started anew. Randomness is the same for both, so whatever differs comes from the data.
"""

from __future__ import annotations

import copy
import hashlib
import json
import random
import secrets
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gramfuse_protocol.messages import phases as m
from gramfuse_protocol.messages.wire import Frame, unpack
from tests.adversarial.liar import METRICS, STATISTICS, Detector, Liar, regression

A = "silo-a"


def outside_the_vector(frame: Frame) -> tuple[str, str]:
    """All that leaves in a message, but for the content of a masked vector."""
    masked = isinstance(unpack(frame, m.REPLIES), m.MaskedReply)
    return frame.header, "" if masked else hashlib.sha256(b"".join(b.tobytes() for b in frame.buffers)).hexdigest()


def with_one_other_record(lied: Liar, place: Path, word: str) -> Liar:
    """The same silos, of which silo-a has one record that differs, in training and among the held-out: a word in it."""
    directory = shutil.copytree(lied.project.directory, place / "project")
    project = copy.copy(lied.project)
    object.__setattr__(project, "directory", directory)
    for file in ("train.jsonl", "held-out.jsonl"):
        path = project.train(A).with_name(file)
        first, *rest = path.read_text().splitlines(True)
        row = json.loads(first)
        path.write_text(json.dumps({**row, "text": f"{row['text']} {word}"}) + "\n" + "".join(rest))
    return Liar(project, place / "state", lied.plan, lied.layout, **lied.limits)


def script(lied: Liar, detector: Detector, word: str) -> None:
    first, zero = lied.about(), lied.zero()
    nothing = detector.model(zero, word, 1e30)
    nothing["delta:bert.encoder.layer.0.output.dense.weight"][:, 0] += 1e20
    lied.measure(A, first, nothing)
    lied.join(A, lied.about(number=3))
    for step in ("join", "train", *STATISTICS):
        lied.measure(A, first, nothing)
        lied.honest((step,), first)
    lied.measure(A, first, nothing, "q1")  # ends the session at silo-a, which is asked for a sum all the same
    for step in (*STATISTICS, *METRICS[:1]):
        lied.step(step, first, A, lied.names)


def rounds(lied: Liar, detector: Detector, word: str) -> None:
    first, later, zero = lied.about(), lied.about(number=2), lied.zero()
    nothing = detector.model(zero, word, 1e30)
    nothing["delta:bert.encoder.layer.0.output.dense.weight"][:, 0] += 1e20
    overflow = detector.model(zero, word, 5e19, also=True)
    lied.contribute(first)
    for name in lied.names:
        lied.measure(name, first, nothing, "simple")
        lied.measure(name, first, overflow)
    lied.honest(METRICS, first)
    lied.honest(("join",), later)
    lied.train(A, later, nothing)
    for session in (None, "ee" * 16, "dd" * 16):  # the start overflows, whatever the data: a failure, and final
        again = lied.about(session, 2)
        lied.join(A, again)
        lied.train(A, again, overflow)
        lied.measure(A, again, nothing)
        for step in (*STATISTICS[:3], "masked-metrics"):
            lied.step(step, again, A, lied.names)
        lied.ask(A, m.FinishRequest(**again))


def another_plan(lied: Liar, detector: Detector, word: str) -> None:
    first = lied.about()
    lied.honest(("join", "train", *STATISTICS[:3]), first)
    for name in lied.names[:3]:
        lied.ask(name, m.SurvivorsRequest(**first, sum_of="statistics", survivors=lied.names[:3]))
    second = lied.under(lied.plan.model_copy(update={"plan": lied.plan.plan.model_copy(update={"version": 2})}))
    second.sent = lied.sent
    second.honest(("join", "train", *STATISTICS[:3]), second.about())
    for step in ("survivors", "unmask"):
        if step == "survivors":
            second.step(step, second.about(), A, second.names)
        else:
            second.ask(A, m.UnmaskRequest(**second.about(), sum_of="statistics", signatures={}))


def divergence(lied: Liar, detector: Detector, word: str) -> None:
    for session in (None, "ee" * 16):
        lied.join(A, lied.about(session))
        lied.train(A, lied.about(session))


def damage(lied: Liar, detector: Detector, word: str) -> None:
    first = lied.about()
    lied.contribute(first)
    lied.measure(A, first, lied.zero())
    state = lied.state(A)
    for file in ("measured.json", "contributed.json", "statistics.safetensors"):
        path = state.directory / file
        content = path.read_bytes()
        path.write_bytes(content[: len(content) // 2])
        lied.measure(A, first, lied.zero(), "simple")
        for step in ("train", "masked-metrics"):
            lied.step(step, first, A, lied.names)
        path.write_bytes(content)


SCRIPTS: dict[str, tuple[Callable[..., None], tuple[str, ...]]] = {
    "every phase, out of order and again": (script, ()),
    "two rounds, crafted candidates and starts": (rounds, ("merge.rounds=2",)),
    "regression, crafted candidates and starts": (rounds, ("merge.rounds=2",)),
    "a second plan over other silos": (another_plan, ()),
    "training that diverges": (divergence, ("training.learning-rate=1000.0",)),
    "state that was cut off": (damage, ()),
}


@pytest.mark.parametrize("told", SCRIPTS)
def test_one_record_makes_no_difference(
    liar: Callable[..., Liar], detector: Detector, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, told: str
) -> None:
    act, settings = SCRIPTS[told]
    change: dict[str, Any] = {"change": regression} if told.startswith("regression") else {}
    lied = liar(*settings, base=detector.path, silos=4, examples=12, **change)
    word = "duck"
    other = with_one_other_record(lied, tmp_path / "other", word)
    for world in (lied, other):
        monkeypatch.setattr(secrets, "token_bytes", random.Random(7).randbytes)
        act(world, detector, word)
    assert {name: len(frames) for name, frames in lied.sent.items()} == {n: len(f) for n, f in other.sent.items()}
    for name in lied.names:
        for one, two in zip(lied.sent[name], other.sent[name], strict=True):
            assert outside_the_vector(one) == outside_the_vector(two)
    differ = [one.digest != two.digest for one, two in zip(lied.sent[A], other.sent[A], strict=True)]
    trained = act is not divergence
    assert any(differ) == trained, "the masked vectors hold the data, so they differ"
