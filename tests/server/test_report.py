"""report.json: what is written is what is read, whatever the report is of; anything else is refused by name."""

from __future__ import annotations

import importlib.util
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gramfuse_protocol.errors import RunDirectoryError
from gramfuse_server.report.page.view import read_report
from gramfuse_server.report.part import ReportPart
from gramfuse_server.report.schema import OPTIONAL, REQUIRED, Report
from tests.pages import RUNS

DOCS = Path(__file__).parents[2] / "docs"


def lay(place: Path, document: dict[str, Any]) -> Path:
    (place / "report.json").write_text(json.dumps(document), encoding="utf-8")
    return place


@pytest.mark.parametrize("run", RUNS)
def test_a_report_that_is_read_and_written_again_is_the_same(run: Callable[[], Any], tmp_path: Path) -> None:
    document, _ = run()
    lay(tmp_path, Report.read(document).document())
    read_report(tmp_path / "report.json")
    assert Report.read(document).document() == json.loads(json.dumps(document))


@pytest.mark.parametrize("run", RUNS)
def test_a_report_without_a_key_that_it_must_have_is_refused_by_name(run: Callable[[], Any], tmp_path: Path) -> None:
    document, _ = run()
    for key in REQUIRED[Report.read(document).subject]:
        if key == "failure":  # without it, it is a report of another kind
            continue
        lay(tmp_path, {name: value for name, value in document.items() if name != key})
        with pytest.raises(RunDirectoryError) as caught:
            read_report(tmp_path / "report.json")
        assert str(tmp_path / "report.json") in str(caught.value)
        assert f"'{key}'" in str(caught.value)


@pytest.mark.parametrize(
    ("path", "key"),
    [((), "extra"), ((), "failures"), (("silos", 0), "tokens"), (("base",), "url"), (("models", 0), "metric")],
)
def test_a_report_with_a_foreign_key_is_refused_by_name(path: tuple[Any, ...], key: str, tmp_path: Path) -> None:
    document, _ = RUNS[0]()
    place: Any = document
    for step in path:
        place = place[step]
    place[key] = "x"
    with pytest.raises(RunDirectoryError, match=r"report\.json") as caught:
        read_report(lay(tmp_path, document) / "report.json")
    assert f"'{'.'.join(map(str, (*path, key)))}'" in str(caught.value)


def test_a_key_of_another_kind_of_report_and_another_version_are_refused_by_name(tmp_path: Path) -> None:
    document, _ = RUNS[0]()
    for key, value in (("heads", "own"), ("schema", "gramfuse.report/2"), ("mode", "closed")):
        with pytest.raises(RunDirectoryError) as caught:
            read_report(lay(tmp_path, {**document, key: value}) / "report.json")
        assert f"'{key}'" in str(caught.value)


@pytest.mark.parametrize(
    ("path", "value", "named"),
    [
        (("models", 0, "metrics", "accuracy"), 7.0, "accuracy"),
        (("models", 0, "metrics", "mcc"), -1.5, "mcc"),
        (("models", 0, "metrics", "examples"), -1.0, "examples"),
        (("models", 0, "silos", "bank", "macro-f1"), math.inf, "macro-f1"),
        (("models", 0, "labels", "", "label-0", "recall"), 1.5, "models.0.labels..label-0.recall"),
        (("models", 0, "labels", "", "label-0", "examples"), -1.0, "models.0.labels..label-0.examples"),
        (("models", 0, "intervals"), {"accuracy": [0.9, 0.1]}, "models.0.intervals"),
        (("rounds", 0, "round"), 0, "rounds.0.round"),
        (("rounds", 0, "solve", 0, "smallest_eigenvalue"), 2.0, "rounds.0.solve.0.smallest_eigenvalue"),
        (("solve", 0, "jitter"), -1e-6, "solve.0.jitter"),
        (("tuning", "alpha", 0, "alpha"), 1.5, "tuning.alpha.0.alpha"),
        (("tuning", "alpha", 0, "metrics", "accuracy"), 1.5, "accuracy"),
        (("tuning", "chosen", "weights", "bank"), 0.0, "tuning.chosen.weights.bank"),
        (("silos", 0, "examples"), -1, "silos.0.examples"),
        (("examples",), -300, "examples"),
    ],
)
def test_a_figure_that_nothing_can_have_is_refused_by_name(
    path: tuple[Any, ...], value: Any, named: str, tmp_path: Path
) -> None:
    document, _ = RUNS[0]()
    place: Any = document
    for step in path[:-1]:
        place = place[step]
    place[path[-1]] = value
    with pytest.raises(RunDirectoryError, match=r"report\.json") as caught:
        read_report(lay(tmp_path, document) / "report.json")
    assert f"'{named}'" in str(caught.value)


def test_every_key_has_its_place_and_says_what_it_is() -> None:
    placed = {key for keys in (*REQUIRED.values(), *OPTIONAL.values()) for key in keys}
    assert placed == {field.alias or name for name, field in Report.model_fields.items()}
    for part in ReportPart.__subclasses__():
        assert all(field.description for field in part.model_fields.values()), part


def test_the_page_about_reports_is_made_from_the_schema_as_it_is() -> None:
    spec = importlib.util.spec_from_file_location("make_report", DOCS / "make_report.py")
    assert spec is not None
    assert spec.loader is not None
    maker = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(maker)
    assert (DOCS / "report.md").read_text(encoding="utf-8") == maker.document(), "make api"
