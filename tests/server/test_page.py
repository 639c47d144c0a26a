"""The page of a report: whole, readable without eyes or network, the same every time, and deaf to what names say."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gramfuse_cli.main import main
from gramfuse_protocol.contract.plan import Plan
from gramfuse_server.report.page import charts
from gramfuse_server.report.verdicts import check_of
from tests.pages import (
    HOSTILE,
    RUNS,
    SILOS,
    Checked,
    card,
    failed_run,
    open_run,
    own_heads,
    page,
    plan_of,
    secure_run,
    show_models,
)


@pytest.mark.parametrize("run", RUNS)
def test_the_page_is_well_formed_loads_nothing_and_can_be_read_without_eyes(run: Callable[[], Any]) -> None:
    text = page(*run())
    found = Checked(text)
    assert text.startswith("<!doctype html>")
    assert found.all("html") == [{"lang": "en"}]
    names = {tag for tag, _ in found.tags}
    assert not names & {"script", "link", "img", "iframe", "object", "form", "button", "video", "base"}
    assert "url(" not in text
    assert "@import" not in text
    assert "://" not in text
    ids = [attributes["id"] for _, attributes in found.tags if "id" in attributes]
    assert len(set(ids)) == len(ids)
    for tag, attributes in found.tags:
        assert not [
            name for name in attributes if name.startswith("on") or name in ("src", "srcset", "style", "action")
        ]
        target = attributes.get("href")
        assert target is None or (tag == "a" and target.startswith("#") and target[1:] in ids)
        for name in (attributes.get("aria-labelledby") or "").split():
            assert name in ids

    assert {"header", "nav", "main", "footer"} <= names
    assert len(found.all("h1")) == len(found.all("main")) == len(found.all("title")) - len(found.all("figure")) == 1
    levels = [int(tag[1]) for tag, _ in found.tags if tag in ("h1", "h2", "h3")]
    assert all(after <= before + 1 for before, after in itertools.pairwise(levels))
    assert found.tags.index(("main", {"id": "content", "tabindex": "-1"})) > 0
    assert next(attributes for attributes in found.all("a"))["href"] == "#content"  # the first stop skips the rest
    assert len(found.all("caption")) == len(found.all("table")) == len(found.all("thead")) > 0
    assert all(attributes.get("scope") in ("col", "row") for attributes in found.all("th"))
    for caption in found.words["caption"]:
        assert caption.strip()
    for attributes in found.all("svg"):
        assert attributes.get("aria-hidden") == "true" or attributes.get("role") == "img"
    pictures = [attributes for attributes in found.all("svg") if attributes.get("role") == "img"]
    assert len(pictures) == len(found.all("desc")) == len(found.all("figure"))
    for section in found.words["section"]:
        assert len(section.strip().splitlines()) > 1, "a section without content"


@pytest.mark.parametrize("run", RUNS)
def test_every_silo_model_and_number_is_on_the_page_and_the_page_is_the_same_every_time(run: Callable[[], Any]) -> None:
    report, plan = run()
    text = page(report, plan)
    assert page(json.loads(json.dumps(report)), plan) == text, "made again from report.json it is another"
    shown = Checked(text).text
    for silo in report["silos"]:
        assert silo["name"] in shown
    for model in report.get("models", []):
        assert model["name"].replace("regmean", "RegMean") in shown
        numbers = [*model["metrics"].values(), *(v for task in model.get("tasks", {}).values() for v in task.values())]
        numbers += [
            metrics[name] for metrics in model.get("silos", {}).values() for name in metrics if name == "accuracy"
        ]
        numbers += [of["f1"] for labels in model.get("labels", {}).values() for of in labels.values()]
        for value in numbers:
            assert charts.score(value) in shown or f"{value:.0f} " in shown, (model["name"], value)
        for labels in model.get("labels", {}).values():
            assert all(label in shown for label in labels)
    for lost in report.get("lost", []):
        assert lost["reason"] in shown
    for step in report.get("solve", []):
        assert step["group"] in shown
    for check in report.get("checks", []):
        assert all(part in shown for part in (check["where"], check["verdict"], f"{check['value']:.4g}"))
    for digest in ("plan_digest", "layout_digest"):
        assert report[digest] in shown


def test_a_bad_check_is_told_before_what_was_merged_and_a_good_one_where_it_belongs() -> None:
    for run, bad in ((secure_run, True), (open_run, False)):
        shown = Checked(page(*run())).text
        assert ("not use the model." in shown) is bad
        assert (shown.rindex("Checks of the merge") < shown.rindex("What was merged")) is bad
    report, plan = open_run()
    report["rounds"][0]["checks"] = [check_of("ratio", "layer.7", 9.125, (None, 8.0), (None, None)).document()]
    assert "9.125" in Checked(page(report, plan)).text, "what is odd in an earlier round is told too"


def test_what_a_failed_run_says_comes_first() -> None:
    report, plan = failed_run()
    shown = Checked(page(report, plan)).text
    assert shown.index("desk: the run failed") < shown.index(report["failure"]["message"])
    assert shown.index(report["failure"]["message"]) < shown.rindex("was to be merged")
    for words in (
        "silos upload masked vectors",
        "gramfuse explain 16",
        "--resume desk-1",
        "had trained",
        "did not connect",
    ):
        assert words in shown
    for words in ("from_pretrained", "sha256sum", "in the merge", "Anyone with the merged model"):
        assert words not in shown
    assert "No sum was unmasked" in shown
    report["failure"] |= {"phase": "evaluate", "resumable": False}
    assert "No sum was unmasked" not in page(report, plan)
    assert "--resume" not in page(report, plan)


def test_the_page_says_who_saw_what_as_the_plan_has_it() -> None:
    secure, opened, own = (Checked(page(*run())).text for run in (secure_run, open_run, own_heads))
    assert "the sum over 3 silos" in secure
    assert "at most 1 silo colludes" in secure
    assert "simulation" not in secure
    assert "silo by itself: Gram matrices" in opened
    assert "not harmless" in opened
    assert "This was a simulation" in opened
    assert "the silos' heads" in own
    assert "the sum over" not in opened
    assert "late\nnot in the merge" not in opened
    assert "not in the merge" in secure


def noisy(model: dict[str, Any]) -> dict[str, Any]:
    """The same model, of which only a sum with noise is known."""
    found = {name: value - 0.004 for name, value in model["metrics"].items()}
    labels = {"": {of: {**told, "interval": [told["f1"] - 0.1, 1.0]} for of, told in model["labels"][""].items()}}
    return {
        **model,
        "metrics": found,
        "labels": labels,
        "intervals": {name: [value - 0.0075, value + 0.005] for name, value in found.items()},
        "privacy": {"epsilon": 2.0, "delta": 1e-5, "total": {"epsilon": 2.9536, "releases": 2}},
    }


def test_what_left_with_noise_is_shown_with_how_far_it_may_be_off_and_what_it_cost(
    capsys: pytest.CaptureFixture[str],
) -> None:
    report, plan = secure_run()
    report["models"] = [noisy(model) for model in report["models"]]
    show_models(report)
    for shown in (Checked(page(report, plan)).text, capsys.readouterr().out, card(plan, SILOS, report["models"][-1])):
        for words in ("0.74", "ε = 2", "2.95", "noise"):
            assert words in shown, words
        assert "0.740 ± 0.007" in shown or "0.7325 to 0.745" in shown
    assert "[0.644, 1.000]" in Checked(page(report, plan)).text
    assert "held-out results, with noise" in Checked(page(report, plan)).text


def test_a_simulation_shows_the_exact_figures_and_what_would_be_seen_without_it(
    capsys: pytest.CaptureFixture[str],
) -> None:
    report, plan = secure_run()
    exact = report["models"]
    report["models"] = [noisy(m) | {"exact": {key: m[key] for key in ("metrics", "labels")}} for m in exact]
    plain = {**report, "models": exact}
    show_models(report)
    shown = " ".join(capsys.readouterr().out.split())
    assert "0.744" in shown
    assert "would show accuracy 0.740 ± 0.007" in shown
    told, without = (Checked(page(one, plan)).text for one in (report, plain))
    assert "would show accuracy 0.740 ± 0.007" in told
    for line in without.splitlines():
        assert line in told, "all that is exact is there"
    assert "±" not in told.replace("would show accuracy 0.740 ± 0.007", "")
    assert card(plan, SILOS, report["models"][-1]) == card(plan, SILOS, exact[-1])


def test_names_and_messages_are_text_whatever_they_hold() -> None:
    report, _ = open_run()
    plan = plan_of(labels=[HOSTILE, "fine"])
    for model in report["models"]:
        model["labels"] = {"": {HOSTILE: {"examples": 1.0, "precision": 1.0, "recall": 1.0, "f1": 1.0}}}
        model["silos"] = {HOSTILE: next(iter(model["silos"].values()))}
        model["note"] = HOSTILE
    report["silos"] = [{"name": HOSTILE, "examples": 3}]
    report["lost"] = [{"name": HOSTILE, "reason": HOSTILE}]
    report["solve"][0]["group"] = report["base"]["name"] = report["plan_digest"] = report["run"] = HOSTILE
    report["versions"]["torch"] = HOSTILE
    failed, _ = failed_run()
    failed["failure"] |= {"message": HOSTILE, "error": HOSTILE, "phase": HOSTILE}
    for found in (report, failed):
        text = page(found, plan)
        checked = Checked(text)
        assert "<script" not in text
        assert not checked.all("script")
        assert not checked.all("img")
        assert checked.text.count(HOSTILE) > 2


ANY = st.floats() | st.sampled_from([0.0, -1.0, 1.0, 1e308, -1e308, 1e-320])


@given(st.lists(ANY | st.none(), min_size=1, max_size=6), st.lists(st.tuples(st.floats(0, 1), ANY), max_size=6))
def test_whatever_numbers_come_nothing_is_drawn_outside_its_room(
    values: list[float | None], points: list[tuple[float, float]]
) -> None:
    for value, bar in zip(values, charts.bars(values, strong=[0], most=1.0), strict=True):
        assert charts.score(value)
        if bar is not None:
            assert 0 <= bar.start <= bar.start + bar.length <= 100.02
    curve = charts.curve("title", "α", points, points[0][0] if points else None, "accuracy")
    for dot in curve.dots if curve else ():
        assert 0 <= dot.x <= 100
        assert charts.TOP - 0.1 <= dot.y <= charts.TOP + charts.HEIGHT + 0.1
    assert curve is None or 2 <= len(curve.ticks) < 8


@pytest.fixture
def gramfuse(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Callable[..., Any]]:
    """Return a function that runs a command and returns its exit code and the one JSON object that it prints."""
    before = signal.getsignal(signal.SIGTERM)

    def run(*arguments: str | Path) -> tuple[int, Any]:
        monkeypatch.setattr(sys, "argv", ["gramfuse", *map(str, arguments), "--json"])
        with pytest.raises(SystemExit) as caught:
            main()
        return int(caught.value.code or 0), json.loads(capsys.readouterr().out)

    yield run
    signal.signal(signal.SIGTERM, before)


def lay(run: Path, report: dict[str, Any], plan: Plan) -> Path:
    """Write a run directory with an old page and with checksums."""
    (run / "model").mkdir(parents=True)
    (run / "model" / "a  b.bin").write_bytes(b"x")
    (run / "report.json").write_text(json.dumps(report))
    (run / "plan.toml").write_text(plan.to_toml())
    (run / "report.html").write_text("old")
    files = sorted(path for path in run.rglob("*") if path.is_file())
    sums = [f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.relative_to(run)}\n" for path in files]
    (run / "SHA256SUMS").write_text("".join(sums))
    return run


def test_the_page_is_made_again_and_the_checksums_still_hold(gramfuse: Callable[..., Any], tmp_path: Path) -> None:
    report, plan = open_run()
    run = lay(tmp_path / "run", report, plan)
    before = (run / "SHA256SUMS").read_text().splitlines()
    assert gramfuse("report", run) == (0, {"page": str(run / "report.html")})
    assert (run / "report.html").read_text(encoding="utf-8") == page(report, plan)
    lines = (run / "SHA256SUMS").read_text().splitlines()
    assert [line[66:] for line in lines] == [line[66:] for line in before]
    assert [one[66:] for one, other in zip(lines, before, strict=True) if one != other] == ["report.html"]
    for line in lines:
        assert hashlib.sha256((run / line[66:]).read_bytes()).hexdigest() == line[:64]
    files = {path.name for path in run.iterdir()}
    assert files == {"model", "report.json", "report.html", "plan.toml", "SHA256SUMS"}

    failed = tmp_path / "run.failed"
    failed.mkdir()
    (failed / "report.json").write_text(json.dumps(failed_run()[0]))
    assert gramfuse("report", failed)[0] == 0
    assert {path.name for path in failed.iterdir()} == {"report.json", "report.html"}


@pytest.mark.parametrize(
    "damage", ["[]", '{"run": "x"}', '{"run": ', '{"run": "x", "mode": "open", "silos": 3}', "\xff"]
)
def test_what_is_no_report_is_named_and_nothing_is_written(
    damage: str, gramfuse: Callable[..., Any], tmp_path: Path
) -> None:
    run = lay(tmp_path / "run", *open_run())
    (run / "SHA256SUMS").unlink()
    (run / "report.json").write_bytes(damage.encode("latin-1"))
    code, printed = gramfuse("report", run)
    assert (code, printed["error"]["type"]) == (15, "RunDirectoryError")
    assert f"{run / 'report.json'}: is damaged" in printed["error"]["message"]
    assert (run / "report.html").read_text() == "old"


def test_reports_that_are_not_there_or_were_changed_are_named(gramfuse: Callable[..., Any], tmp_path: Path) -> None:
    run = lay(tmp_path / "run", *open_run())
    (run / "report.json").write_text(json.dumps({**open_run()[0], "examples": 7}))
    assert "was changed" in gramfuse("report", run)[1]["error"]["message"]
    assert (run / "report.html").read_text() == "old"
    assert "has no report.json; expected" in gramfuse("report", tmp_path)[1]["error"]["message"]
    (tmp_path / "lost.failed").mkdir()
    (tmp_path / "lost.failed" / "report.json").write_text("{}")
    code, printed = gramfuse("report", tmp_path / "lost")
    assert code == 15
    assert f"its report is in {tmp_path / 'lost.failed'}" in printed["error"]["message"]


def test_metrics_that_are_no_numbers_do_not_keep_a_page_from_being_made() -> None:
    report, plan = secure_run()
    for model in report["models"]:
        model["metrics"] |= {"accuracy": math.nan, "mcc": math.nan}
    assert charts.NONE in Checked(page(report, plan)).text
