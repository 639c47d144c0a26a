"""Lies of which each silo's own view is consistent, and theirs together are not."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
from flwr.app import Context, Message

from gramfuse_client.state.state import State
from gramfuse_protocol.messages.flower_records import from_record, to_record
from gramfuse_protocol.messages.phases import REQUESTS, EvaluateRequest, Refusal
from gramfuse_protocol.messages.wire import pack, unpack
from gramfuse_protocol.secure_sum.masks import apply
from gramfuse_protocol.secure_sum.member import Signed
from gramfuse_protocol.secure_sum.statements import metrics_context
from gramfuse_protocol.secure_sum.unmasking import unmasking
from tests.exchange.secure.coordinator import Coordinator, assert_over, at
from tests.exchange.secure.runs import NAMES, A, B, C, D, Run, Site, distance


def test_silos_that_are_told_different_things_find_out(script: Coordinator, place: Path) -> None:
    """Lists of keys, survivors, and models: each silo's own view is consistent, and theirs together are not."""
    c = Coordinator(script.site, script.plan, place, str(script.about["session"]))
    c.requests, c.replies = copy.copy(script.requests), copy.copy(script.replies)

    at(script, "shares", place / "keys", A, B)
    # B is told that E is not there, and seals its shares for the others.
    apart = c.ask(B, c.requests["shares"][B][0].model_copy(update={"adverts": c.adverts[:4]}), place / "keys")
    assert not isinstance(c.ask(A, c.requests["shares"][A][0], place / "keys"), Refusal)
    sealed = {**c.sealed(A), B: apart.sealed[A]}
    reply = c.ask(A, c.requests["masked"][A][0].model_copy(update={"sealed": sealed}), place / "keys")
    assert (reply.error, "different lists of keys" in reply.reason) == ("SecurityError", True)
    assert_over(script, place / "keys", A)

    at(script, "survivors", place / "survivors", A, B, C, D)
    # A and B are told that E is dead, C and D that it is alive: either kind of E's shares, from different silos.
    signatures = {
        name: c.ask(
            name, c.requests["survivors"][name][0].model_copy(update={"survivors": survivors}), place / "survivors"
        ).signature
        for name, survivors in {A: NAMES[:4], B: NAMES[:4], C: NAMES, D: NAMES}.items()
    }
    for name in (A, B, C, D):
        request = c.requests["unmask"][name][0].model_copy(update={"signatures": signatures})
        reply = c.ask(name, request, place / "survivors")
        assert (reply.error, "not signed" in reply.reason) == ("SecurityError", True)
        assert_over(script, place / "survivors", name)

    at(script, "evaluate", place / "models", *NAMES)
    # One silo measures another model under the same name, so that the sum shows its metrics apart.
    other = c.requests["evaluate"][B][1].model_copy(update={"arrays": c.models["simple"]})
    for name in NAMES:
        first, second = c.requests["evaluate"][name]
        for request in (first, other if name == B else second, c.requests["masked-metrics"][name][0]):
            assert not isinstance(c.ask(name, request, place / "models"), Refusal)
    signatures = {
        name: c.ask(name, c.requests["survivors-metrics"][name][0], place / "models").signature for name in NAMES
    }
    reply = c.ask(A, c.requests["unmask-metrics"][A][0].model_copy(update={"signatures": signatures}), place / "models")
    assert (reply.error, repr(B) in reply.reason) == ("SecurityError", True)
    assert_over(script, place / "models", A)


def test_what_one_silo_measured_apart_stays_masked_though_the_others_agree(script: Coordinator, place: Path) -> None:
    """All but silo-b measure a model that tells nothing; they are enough to sign, and open the sum that it is in."""
    at(script, "evaluate", place, *NAMES)
    c = Coordinator(script.site, script.plan, place, str(script.about["session"]))
    c.requests, c.replies = copy.copy(script.requests), copy.copy(script.replies)
    agreed = tuple(name for name in NAMES if name != B)
    vectors = []
    for name in NAMES:
        first, second = c.requests["evaluate"][name]
        told = second if name == B else second.model_copy(update={"arrays": c.models["simple"]})
        for request in (first, told):
            assert not isinstance(c.ask(name, request), Refusal)
        vectors.append(c.ask(name, c.requests["masked-metrics"][name][0]).arrays["masked"])
    total = np.sum(vectors, axis=0, dtype=np.uint64)
    known = {n: State(place / "state" / n, c.plan.digest).measurements.of(1) for n in NAMES}
    counts = np.sum([[w for m in known[n].values() for w in m.words] for n in NAMES], axis=0, dtype=np.uint64)
    asked = {name: c.requests["survivors-metrics"][name][0] for name in agreed}
    signatures = {name: c.ask(name, request).signature for name, request in asked.items()}
    request = c.requests["unmask-metrics"][A][0].model_copy(update={"signatures": signatures})
    replies = {name: c.ask(name, request) for name in agreed}
    shares = {n: {owner: bytes.fromhex(share) for owner, share in r.shares.items()} for n, r in replies.items()}
    for name in (A, B):  # what the others signed, and what silo-b would have
        signed = Signed(survivors=NAMES, context=metrics_context({m: of.model for m, of in known[name].items()}))
        opened = total.copy()
        apply(
            opened,
            unmasking(c.plan.roster, str(c.about["session"]), c.adverts, "metrics", NAMES, signed, shares),
        )
        assert not np.isin(opened, counts).any()
        assert (np.abs(opened.view(np.int64)) > 2**36).any(), "words of a sum of counts are small"


def test_a_sum_of_metrics_that_does_not_open_is_no_metric(site: Site, in_process_grid: Any, place: Path) -> None:
    """Somebody on the way to silo-c has it measure another model; the others are enough to sign."""
    run = Run(site, site.plan(), place)
    honest = run.nodes()

    def lied_to(message: Message, context: Context) -> Message:
        request = unpack(from_record(message.content), REQUESTS)
        if isinstance(request, EvaluateRequest):
            other = {name: np.zeros_like(array) for name, array in request.arrays.items()}
            message.content = to_record(pack(request.model_copy(update={"arrays": other})))
        return honest[C](message, context)

    run.nodes = lambda: {**honest, C: lied_to}  # type: ignore[method-assign]
    report = run.start(in_process_grid)
    assert report["models"] == []
    assert "different models" in report["unmeasured"]
    assert [silo["name"] for silo in report["lost"]] == [C]
    assert distance(run.deltas, site.merged(run.plan, NAMES)) <= 1e-6
