"""A coordinator that wants more of the results on validation examples than the choice between two heads."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from gramfuse_client.data.examples import load, load_validation
from gramfuse_client.guard.releases import Releases
from gramfuse_client.state.state import State
from gramfuse_protocol.messages.phases import EvaluateRequest, MaskedRequest
from tests.adversarial.test_fitted_head import _no_waiting  # noqa: F401  # a fixture
from tests.conftest import messages
from tests.exchange.heads.conftest import site  # noqa: F401  # a fixture
from tests.exchange.heads.test_kept_head import with_validation
from tests.exchange.rounds.conftest import trainings  # noqa: F401  # a fixture
from tests.exchange.rounds.runs import Site
from tests.grid import _task_identity, in_process_grid, no_waiting  # noqa: F401  # fixtures

REFIT = 3
"""Number of the session that fits the head again."""


@pytest.fixture
def here(site: Callable[..., Site]) -> Site:  # noqa: F811
    made = site("merge.refit=true", silos=4, secure=True)
    with_validation(made, {name: messages(12, 700 + n) for n, name in enumerate(made.plan.names)})
    return made


@pytest.mark.parametrize("candidates", [("refitted",), ("regmean-validation", "refitted-validation")])
def test_results_on_validation_examples_leave_only_with_all_others(here: Site, candidates: tuple[str, ...]) -> None:
    """A sum of fewer results has less noise in it than ε says of all together."""

    def change(_: str, request: Any) -> Any:
        if isinstance(request, MaskedRequest) and request.round == REFIT and request.sum_of == "metrics":
            return request.model_copy(update={"candidates": candidates})
        return request

    report = here.run(change=change)
    assert report["unmeasured"]
    assert "head_choice" not in report
    sent = [reply for _, reply in here.replies if reply.round == REFIT and getattr(reply, "sum_of", "") == "metrics"]
    assert sent == []


@pytest.mark.parametrize("candidate", ["regmean", "regmean-validation"])
def test_no_model_of_the_coordinators_choice_is_measured_on_validation_examples(here: Site, candidate: str) -> None:
    def change(_: str, request: Any) -> Any:
        if isinstance(request, EvaluateRequest) and request.round == REFIT:
            return request.model_copy(update={"candidate": candidate})
        return request

    report = here.run(change=change)
    assert report["unmeasured"]
    refusals = [reply for _, reply in here.replies if reply.phase == "refusal"]
    assert [reply.error for reply in refusals] == ["SecurityError"] * len(refusals) != []


def test_only_the_head_may_differ_from_the_model_that_it_was_fitted_to(here: Site) -> None:
    body = "delta:bert.encoder.layer.1.output.dense.weight"

    def change(_: str, request: Any) -> Any:
        if isinstance(request, EvaluateRequest) and request.round == REFIT:
            arrays = {**request.arrays, body: request.arrays[body] + np.float32(0.5)}
            return request.model_copy(update={"arrays": arrays})
        return request

    report = here.run(change=change)
    assert "only the head may differ" in report["unmeasured"]
    assert not [one for _, one in here.replies if one.round == REFIT and getattr(one, "sum_of", "") == "metrics"]


def test_each_result_has_noise_of_its_own_and_its_rows_are_on_record(here: Site) -> None:
    report = here.run()
    assert "head_choice" in report
    for name in here.plan.names:
        silo = here.silo(name)
        stored = State(silo.state, here.plan.digest, REFIT).measurements.of(REFIT)
        assert set(stored) == {"refitted", "regmean-validation", "refitted-validation"}
        words = [np.array(stored[each].words, np.uint64) for each in stored]
        assert all((one != other).any() for n, one in enumerate(words) for other in words[:n])
        releases = Releases(silo.state / "releases")
        last = next(one for one in reversed(releases.read()) if one.sum_of == "metrics" and one.round == REFIT)
        task = here.plan.task_of(name)
        examples = (load(silo, task)[1], load_validation(silo, task))
        rows = releases.rows(key for each in examples for key in each.input_keys)
        assert last.rows == releases.keep_rows(key for each in examples for key in each.input_keys)
        assert len(rows) > len(releases.rows(examples[0].input_keys))
