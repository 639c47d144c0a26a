"""Which head a run keeps, the merged one or the one that is fitted again: results on validation examples decide."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from gramfuse_model.loading.base_model import load_base
from gramfuse_model.parameters import add_differences
from tests.conftest import LABELS, messages, write_jsonl
from tests.exchange.rounds.runs import Models, Site


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


def test_validation_examples_that_are_wrong_end_the_run_before_its_last_sums(site: Callable[..., Site]) -> None:
    here = site("merge.refit=true")
    with_validation(here, {"silo-a": [{"text": "a cow", "label": "furniture"}]})
    report = here.run()
    assert report["merged"] == "regmean"
    assert report["unfitted"]
