"""A head that is fitted in closed form, before training and after it: exchanges of their own."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from gramfuse_client.data.batches import Encoded, batches
from gramfuse_client.data.examples import load
from gramfuse_client.measuring.head_sums import collect_head_sums
from gramfuse_model.loading.base_model import load_base
from gramfuse_model.parameters import set_values
from gramfuse_protocol.statistics.head_sums import HeadSums
from gramfuse_server.merging.closed_form_head import fit_head
from gramfuse_server.merging.head_accumulator import START_SCALE
from gramfuse_server.merging.head_solvers import SEEN
from tests.exchange.rounds.runs import Models, Site, assert_close


def sums_by_hand(here: Site, weights: dict[str, np.ndarray] | None = None) -> HeadSums:
    """The sums over all silos' examples, for the base or other weights."""
    total: HeadSums | None = None
    for name in here.plan.names:
        base = load_base(here.plan, here.project.directory)
        if weights is not None:
            set_values(base.model, weights)
        task = here.plan.task_of(name)
        examples = load(here.silo(name), task)[0]
        kept = [n for n, label in enumerate(examples.labels) if examples.labels.count(label) > 1]
        encoded = Encoded(examples.take(kept), base.tokenizer, task)
        sums = collect_head_sums(base.model, batches(encoded, 8, torch.device("cpu")), task)
        total = sums if total is None else total + sums
    assert total is not None
    return total


@pytest.mark.parametrize("secure", [False, True], ids=["open", "secure"])
def test_all_silos_start_from_the_head_of_all_examples_together(site: Callable[..., Site], secure: bool) -> None:
    here, models = site(secure=secure), Models()

    report = here.run(change=models)
    head = fit_head(sums_by_hand(here), prior=False).scaled(START_SCALE)
    base = load_base(here.plan, here.project.directory).model.state_dict()
    assert len(models.starts) == 3
    for start in models.starts:
        assert set(start) == {"delta:classifier.weight", "delta:classifier.bias"}  # nothing else differs
        for name, value in (("classifier.weight", head.weight), ("classifier.bias", head.bias)):
            found = base[name].numpy() + start[f"delta:{name}"]
            assert np.allclose(found, value, rtol=1e-5, atol=1e-6 * np.abs(value).max()), name
    assert [one["work"] for one in report["rounds"]] == ["fit", "train"]
    assert report["merged"] == "regmean"
    assert [model["kind"] for model in report["models"]] == ["simple", "regmean"]
    assert report["rounds"][0]["models"] == []


@pytest.mark.parametrize("secure", [False, True], ids=["open", "secure"])
def test_the_head_is_fitted_again_to_the_merged_body(site: Callable[..., Site], secure: bool) -> None:
    here, models = site("merge.refit=true", secure=secure), Models()

    report = here.run(change=models)
    base = load_base(here.plan, here.project.directory).model.state_dict()
    merged = {
        name.removeprefix("delta:"): base[name.removeprefix("delta:")].numpy() + delta
        for name, delta in models.sent[2, "regmean"].items()
    }
    head = fit_head(sums_by_hand(here, merged), prior=True).calibrated.scaled(SEEN)
    expected = {**merged, "classifier.weight": head.weight, "classifier.bias": head.bias}
    assert_close({name: here.weights[name] for name in expected}, expected, 1e-4)
    assert [one["work"] for one in report["rounds"]] == ["fit", "train", "refit"]
    assert report["merged"] == "refitted"
    assert [model["kind"] for model in report["models"]] == ["simple", "regmean", "refitted"]


@pytest.mark.parametrize("secure", [False, True], ids=["open", "secure"])
def test_without_training_the_fitted_head_on_the_base_is_the_result(site: Callable[..., Site], secure: bool) -> None:
    here = site("training.epochs=0", secure=secure)
    report = here.run()
    head = fit_head(sums_by_hand(here), prior=True).calibrated
    base = load_base(here.plan, here.project.directory).model.state_dict()
    expected = {name: value.numpy() for name, value in base.items()}
    expected |= {"classifier.weight": head.weight, "classifier.bias": head.bias}
    assert_close({name: here.weights[name] for name in expected}, expected, 1e-5)
    assert report["merged"] == "fitted"
    assert [model["kind"] for model in report["models"]] == ["fitted"]
    assert {tensor.name for tensor in here.layout.tensors} == set(here.layout.head.tensors)
    assert sum(report["bytes"]["silo-a"].values()) < 20_000
    assert load_file(here.out / "model" / "model.safetensors")
