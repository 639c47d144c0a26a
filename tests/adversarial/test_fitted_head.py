"""What the sums of a head give away, and what a coordinator that lies about them gains."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from gramfuse_client.guard.releases import Cohort, Release, Releases, Survivor
from gramfuse_model.head_features import features_of
from gramfuse_model.loading.base_model import load_base
from gramfuse_model.normal_equations import summands
from gramfuse_protocol.contract.layout import Layout, Tensor
from gramfuse_protocol.contract.stages import subtractable
from gramfuse_protocol.errors import GramfuseError
from gramfuse_protocol.messages.flower_records import from_record, to_record
from gramfuse_protocol.messages.phases import REPLIES, EvaluateRequest, TrainRequest, UploadReply
from gramfuse_protocol.messages.wire import pack, unpack
from gramfuse_protocol.statistics.contribution import Statistics
from gramfuse_protocol.statistics.head_sums import HeadSums
from gramfuse_server.merging.head_accumulator import HeadAccumulator
from tests.conftest import messages, write_jsonl
from tests.exchange.heads.conftest import site  # noqa: F401  # a fixture
from tests.exchange.rounds.conftest import trainings  # noqa: F401  # a fixture
from tests.exchange.rounds.runs import Site
from tests.grid import _task_identity, in_process_grid, no_waiting  # noqa: F401  # fixtures


@pytest.fixture(autouse=True)
def _no_waiting(no_waiting: None) -> None:  # noqa: F811
    """In every test of this file."""


@pytest.fixture
def sums(monkeypatch: pytest.MonkeyPatch) -> list[HeadSums]:
    """What the coordinator reads, in order: the sums of heads once they are unmasked."""
    read: list[HeadSums] = []
    load = HeadAccumulator.load

    def keep(self: HeadAccumulator, words: Any, silos: int) -> None:
        load(self, words, silos)
        read.append(self.sums)

    monkeypatch.setattr(HeadAccumulator, "load", keep)
    return read


def features(here: Site, texts: list[str]) -> np.ndarray:
    """What anyone with the base model can compute of texts."""
    base = load_base(here.plan, here.project.directory)
    batch = dict(base.tokenizer(texts, padding=True, return_tensors="pt"))
    with torch.no_grad():
        return features_of(base.model, batch, 3, "head").double().numpy()


def give_alone(here: Site, texts: list[str]) -> None:
    """Have one silo alone bring examples of one label."""
    for name in here.plan.names:
        path = here.project.train(name)
        rows = [row for row in map(json.loads, path.read_text().splitlines()) if row["label"] != "kitchen"]
        if name == "silo-b":
            rows += [{"text": text, "label": "kitchen"} for text in texts]
        write_jsonl(path, rows)


@pytest.mark.parametrize("secure", [False, True], ids=["open", "secure"])
def test_the_column_of_a_label_that_one_silo_alone_has_is_that_silos_own(
    site: Callable[..., Site],  # noqa: F811
    sums: list[HeadSums],
    secure: bool,
) -> None:
    """It is not claimed that it is hidden: this measures what it tells."""
    here = site("training.epochs=0", silos=4, secure=True)
    texts = [row["text"] for row in messages(60, 7) if row["label"] == "kitchen"][:3]
    give_alone(here, texts)
    here.run()
    (read,) = sums
    assert read.counts[2] == 3
    assert np.allclose(read.first[:-1, 2], features(here, texts).sum(axis=0), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("least", [1, 2])
def test_a_single_example_of_a_label_can_be_recognised_unless_the_silo_leaves_it_out(
    site: Callable[..., Site],  # noqa: F811
    sums: list[HeadSums],
    least: int,
) -> None:
    here = site("training.epochs=0", silos=4, secure=True)
    candidates = list(dict.fromkeys(row["text"] for row in messages(900, 7) if row["label"] == "kitchen"))
    give_alone(here, [candidates[100]])
    if least == 1:
        for name in here.plan.names:
            here.project.replace(here.project.silo(name), "[limits]\n", "[limits]\nminimum-label-examples = 1\n")
    here.run()
    (read,) = sums
    assert read.counts[2] == (1 if least == 1 else 0)
    if least == 1:
        distances = np.linalg.norm(features(here, candidates) - read.first[:-1, 2], axis=1)
        assert len(candidates) > 200
        assert int(distances.argmin()) == 100  # which of hundreds of texts it is
    else:
        assert not read.first[:, 2].any()


def brings_the_head(request: Any) -> bool:
    """Whether a request brings the model with the fitted head."""
    start = isinstance(request, TrainRequest) and request.round == 2
    return start or (isinstance(request, EvaluateRequest) and (request.round, request.candidate) == (1, "fitted"))


@pytest.mark.parametrize("fooled", [("silo-a",), ("silo-b", "silo-c", "silo-d")])
def test_silos_that_were_given_different_heads_take_part_in_no_sum(
    site: Callable[..., Site],  # noqa: F811
    fooled: tuple[str, ...],
) -> None:
    here = site(silos=4, secure=True)

    def change(name: str, request: Any) -> Any:
        if name in fooled and brings_the_head(request):
            arrays = {key: array * np.float32(0.5) for key, array in request.arrays.items()}
            return request.model_copy(update={"arrays": arrays})
        return request

    if len(fooled) == 1:  # the others go on without it
        report = here.run(change=change)
        assert report["rounds"][1]["survivors"] == ["silo-b", "silo-c", "silo-d"]
        assert "not signed" in next(lost["reason"] for lost in report["lost"] if lost["name"] == "silo-a")
    else:
        with pytest.raises(GramfuseError, match=f"the keys of silo '{fooled[0]}': not signed"):
            here.run(change=change)
    shared = [name for name, reply in here.replies if reply.round == 2 and reply.phase in ("shares", "masked")]
    assert not set(shared) & set(fooled)


def test_a_head_other_than_the_one_that_was_fitted_is_not_trained_from(
    site: Callable[..., Site],  # noqa: F811
) -> None:
    here = site(silos=4, secure=True)

    def change(_: str, request: Any) -> Any:
        if isinstance(request, TrainRequest) and request.round == 2:
            arrays = {key: array * np.float32(0.5) for key, array in request.arrays.items()}
            return request.model_copy(update={"arrays": arrays})
        return request

    with pytest.raises(GramfuseError, match="the starting model is not"):
        here.run(change=change)
    assert not [reply for _, reply in here.replies if reply.round == 2 and reply.phase == "keys"]


WEIGHT = "delta:classifier.weight"
BODY = "delta:bert.encoder.layer.1.output.dense.weight"


@pytest.mark.parametrize(
    ("arrays", "named"),
    [
        ({BODY: 1e-3 * np.ones((16, 24), np.float32)}, r"bert\.encoder\.layer\.1\.output\.dense\.weight"),
        ({WEIGHT: 1e6 * np.ones((3, 16), np.float32)}, "largest output"),
        ({WEIGHT: np.full((3, 16), 3e38, np.float32)}, "largest output"),
    ],
    ids=["a body of its own", "a huge head", "a head that overflows"],
)
def test_a_model_of_the_coordinators_own_making_is_not_taken_for_the_fitted_head(
    site: Callable[..., Site],  # noqa: F811
    arrays: dict[str, np.ndarray],
    named: str,
) -> None:
    here = site(silos=4, secure=True)

    def change(_: str, request: Any) -> Any:
        if brings_the_head(request):
            return request.model_copy(update={"arrays": {**request.arrays, **arrays}})
        return request

    with pytest.raises(GramfuseError):
        here.run(change=change)
    refusals = [reply.reason for _, reply in here.replies if reply.phase == "refusal" and reply.round == 1]
    assert len(refusals) >= 2  # then too few are left
    assert all(re.search(named, reason) for reason in refusals)
    assert not [reply for _, reply in here.replies if reply.round == 2 and reply.phase != "join"][4:]


def test_a_silo_that_lies_about_its_head_in_training_is_seen(
    site: Callable[..., Site],  # noqa: F811
) -> None:
    here = site(silos=4)

    def lie(visit: Any, deliver: Any) -> Any:
        content = deliver()
        reply = unpack(from_record(content), REPLIES)
        if visit.node == "silo-a" and isinstance(reply, UploadReply) and reply.round == 2:
            wrong = {**reply.arrays, "delta:classifier.bias": np.array([200, 0, 0], np.float32)}
            return to_record(pack(reply.model_copy(update={"arrays": wrong})))
        return content

    report = here.run(fault=lie)
    bad = {check["where"] for check in report["checks"] if check["verdict"] == "bad"}
    assert "classifier.bias" in bad


def test_sums_that_count_no_examples_count_no_batches_either() -> None:
    layout = Layout(
        groups=(),
        tensors=(Tensor(name="w", shape=(2,), merge="mean"), Tensor(name="n", shape=(), merge="sum", buffer=True)),
        frozen=(),
    )
    blocks = {"delta:w": np.ones(2, np.float32), "delta:n": np.float32(35)}
    for counted, expected in ((True, [1, 7, 35]), (False, [1, 0, 0])):
        found = dict(summands(layout, Statistics(7, {}, blocks), alpha=1, weighting="uniform", counted=counted))
        values = {block.name: array for block, array in found.items()}
        assert [*values["count"].tolist(), float(values["m:n"])] == expected


def test_another_minimum_of_examples_is_another_way_to_read_rows(tmp_path: Path) -> None:
    survivor = Survivor(name="silo-a", key="0" * 64, terms="0" * 64)
    releases = Releases(tmp_path)
    rows = releases.keep_rows([("one", None), ("two", None)])
    cohort = Cohort(plan="1" * 64, reading="2" * 64, colluding=1, least=2, silo=survivor, others=())
    releases.add(Release(round=1, session="3" * 32, sum_of="head", cohort=cohort, rows=rows))
    assert releases.conflict(releases.rows([("one", None)]), "head", cohort) is None
    other = cohort.model_copy(update={"least": 1})
    assert "minimum-label-examples" in (releases.conflict(releases.rows([("one", None)]), "head", other) or "")
    assert releases.conflict(releases.rows([("three", None)]), "head", other) is None


@pytest.mark.parametrize("candidate", ["regmean", "simple", "refitted"])
def test_a_fitted_head_is_measured_by_nobody_before_training(
    site: Callable[..., Site],  # noqa: F811
    candidate: str,
) -> None:
    """A model that is not to be measured brings no numbers, whatever it is called."""
    here = site(silos=4, secure=True)

    def change(_: str, request: Any) -> Any:
        if isinstance(request, EvaluateRequest) and request.round == 1:
            return request.model_copy(update={"candidate": candidate})
        return request

    with pytest.raises(GramfuseError, match="did not complete the previous session"):
        here.run(change=change)
    assert not [reply for _, reply in here.replies if reply.round == 1 and reply.phase == "evaluate"]


SUBJECTS = ("statistics", "uncounted", "head", "metrics")


def test_only_sums_without_anything_in_common_may_differ_by_few_silos() -> None:
    free = {frozenset(pair) for pair in itertools.combinations(SUBJECTS, 2) if not subtractable(*pair)}
    assert free == {frozenset(("head", "uncounted")), *(frozenset((one, "metrics")) for one in SUBJECTS[:3])}
    assert all(subtractable(one, one) for one in SUBJECTS)


def test_a_head_over_fewer_silos_under_another_plan_is_not_signed(
    site: Callable[..., Site],  # noqa: F811
    tmp_path: Path,
) -> None:
    here = site("training.epochs=0", silos=4, secure=True)
    here.run()
    fewer = here.project.plan.read_text().replace('name = "pico"', 'name = "fewer"', 1)
    head, _, last = fewer.rpartition("\n[[silo]]\n")
    assert "silo-d" in last
    here.project.plan.write_text(head)
    other = Site(
        here.project,
        here.make_grid,
        here.state.parent,
        1,
        'model.head="fitted"',
        "training.epochs=0",
        "training.freeze=[]",
        "privacy.colluding=0",
    )
    other.out = tmp_path / "other"
    with pytest.raises(GramfuseError):
        other.run()
    assert not (tmp_path / "other" / "model").exists()
