"""Which head a run keeps, the merged one or the one that is fitted again: results on validation examples decide."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Error, RecordDict

from gramfuse_model.loading.base_model import load_base
from gramfuse_model.parameters import add_differences
from gramfuse_protocol.errors import GramfuseError
from gramfuse_protocol.statistics.head_sums import HeadSums
from gramfuse_server.report.schema import Measured
from gramfuse_server.run.head_choice import choose
from tests.conftest import LABELS, messages, write_jsonl
from tests.exchange.rounds.runs import Answer, Models, Site


def with_validation(site: Site, rows: dict[str, list[Any]]) -> None:
    """Give silos validation examples."""
    for silo, theirs in rows.items():
        path = site.project.silo(silo)
        write_jsonl(site.project.directory / "data" / silo / "validation.jsonl", theirs)
        text = path.read_text()
        path.write_text(text.replace("[data]\n", f'[data]\nvalidation = "../data/{silo}/validation.jsonl"\n', 1))


def sent_model(site: Site, models: Models, session: int, name: str) -> Any:
    base = load_base(site.plan, site.project.directory)
    deltas = {key.removeprefix("delta:"): value for key, value in models.sent[session, name].items()}
    add_differences(base.model, deltas)
    return base


def said_by(base: Any, rows: list[Any]) -> list[str]:
    """The answers of a model to texts."""
    tokens = base.tokenizer([row["text"] for row in rows], return_tensors="pt", padding=True)
    with torch.no_grad():
        return [LABELS[n] for n in base.model.eval()(**tokens).logits.argmax(dim=1).tolist()]


@pytest.mark.parametrize("secure", [False, True], ids=["open", "secure"])
def test_the_head_that_is_better_on_validation_examples_is_kept(site: Callable[..., Site], secure: bool) -> None:
    settings = ("merge.refit=true", *(('privacy.metrics-epsilon="none"',) if secure else ()))
    first, models = site(*settings, secure=secure, name="first"), Models()
    assert "head_choice" not in first.run(change=models)  # no silo has validation examples
    merged, refitted = sent_model(first, models, 2, "regmean"), sent_model(first, models, 3, "refitted")
    pool = messages(120, 900)
    answers = {"regmean": said_by(merged, pool), "refitted": said_by(refitted, pool)}
    pairs = zip(*answers.values(), strict=True)
    apart = [n for n, (one, other) in enumerate(pairs) if one != other]
    assert apart, "the two heads answer alike, so this test shows nothing"

    for right in answers:
        here = site(*settings, secure=secure, name=right)
        rows = [{"text": pool[n]["text"], "label": answers[right][n]} for n in range(len(pool))]
        with_validation(here, {"silo-a": rows[:50], "silo-c": rows[50:]})  # the second silo has none
        report = here.run(change=(sent := Models()))

        choice = report["head_choice"]
        assert choice["kept"] == report["merged"] == right
        assert choice["metric"] == "accuracy"
        other = next(name for name in answers if name != right)
        assert choice["scores"][right] == 1 > choice["scores"][other]
        assert [model["kind"] for model in report["models"]] == ["simple", "regmean", "refitted"]
        expected = sent_model(here, sent, {"regmean": 2, "refitted": 3}[right], right).model.state_dict()
        found = here.weights
        for name in ("classifier.weight", "classifier.bias"):
            assert np.allclose(found[name], expected[name].numpy(), atol=1e-7), name


def test_validation_examples_that_are_wrong_are_refused_before_any_work(site: Callable[..., Site]) -> None:
    here = site("merge.refit=true")
    with_validation(here, {"silo-a": [{"text": "a cow", "label": "furniture"}]})
    with pytest.raises(GramfuseError, match="silo-a"):
        here.run()
    assert {event["work"] for event in here.events} == {"fit"}


def measured(name: str, accuracy: float, examples: float, noise: float = 0.0) -> Measured:
    figures = {"accuracy": accuracy, "examples": examples}
    widths = {"accuracy": noise, "examples": 100 * noise}
    intervals = (
        {key: (max(0.0, value - widths[key]), value + widths[key]) for key, value in figures.items()} if noise else {}
    )
    return Measured(name=name, kind=name, metrics=figures, intervals=intervals)


@pytest.mark.parametrize(
    ("before", "after", "examples", "noise", "kept"),
    [
        (0.9, 0.8, 50.0, 0.0, "regmean"),
        (0.8, 0.8, 50.0, 0.0, "refitted"),
        (0.9, 0.8, 50.0, 0.04, "regmean"),
        (0.9, 0.8, 50.0, 0.06, "refitted"),
        (0.9, 0.1, 3.0, 0.06, None),  # no more examples than noise alone would give
    ],
)
def test_noise_alone_decides_nothing(
    site: Callable[..., Site], before: float, after: float, examples: float, noise: float, kept: str | None
) -> None:
    plan = site("merge.refit=true").plan
    results = [measured("a", before, examples, noise), measured("b", after, examples, noise)]
    choice = choose(plan, plan.stages[-1], results)
    assert (None if choice is None else choice.kept) == kept


def away(here: Site, silo: str, work: str) -> Callable[[Any, Answer], RecordDict | Error]:
    def fault(visit: Any, deliver: Answer) -> RecordDict | Error:
        if visit.node == silo and visit.phase == "train" and here.events[-1].get("work") == work:
            return Error(5, "it is away")
        return deliver()

    return fault


@pytest.mark.parametrize("work", ["train", "refit"])
def test_in_open_mode_the_result_is_that_of_all_who_trained_or_fitted_again(
    site: Callable[..., Site], work: str
) -> None:
    here = site("merge.refit=true", "privacy.minimum-survivors=2")
    report = here.run(fault=away(here, "silo-c", work))
    assert report["merged"] == "refitted"
    without = ["silo-a", "silo-b"]
    assert [one["survivors"] for one in report["rounds"]][1:] == [
        without if work == "train" else [*without, "silo-c"],
        without if work == "refit" else [*without, "silo-c"],
    ]
    assert [silo["name"] for silo in report["silos"]] == [*without, "silo-c"]
    assert all(name in (here.out / "model" / "README.md").read_text() for name in [*without, "silo-c"])


def more_examples(second: np.ndarray) -> np.ndarray:
    return 1.2 * second


def impossible_squares(second: np.ndarray) -> np.ndarray:
    """Two features with negative squares and a large product."""
    wrong = second.copy()
    wrong[0, 0] = wrong[1, 1] = -1e4
    wrong[0, 1] = wrong[1, 0] = 1e4
    return wrong


@pytest.mark.parametrize(
    ("spoil", "named"), [(more_examples, "labels less examples"), (impossible_squares, "no head can be fitted")]
)
def test_a_bad_second_fit_leaves_the_good_merge(
    site: Callable[..., Site], monkeypatch: pytest.MonkeyPatch, spoil: Callable[[np.ndarray], np.ndarray], named: str
) -> None:
    def lie(self: HeadSums, layout: Any) -> Any:
        return blocks(HeadSums(spoil(self.second), self.first) if lying else self, layout)

    def watch(event: dict[str, Any]) -> None:
        if event.get("work") == "refit":
            lying.append(True)

    lying: list[bool] = []
    blocks = HeadSums.blocks
    monkeypatch.setattr(HeadSums, "blocks", lie)
    here = site("merge.refit=true")
    report = here.run(watch=watch)
    assert report["merged"] == "regmean"
    assert named in report["unfitted"]
    assert "Do not use" not in (here.out / "model" / "README.md").read_text()
