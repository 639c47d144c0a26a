"""The page of a report: whole, readable without eyes or network, the same every time, and deaf to what names say."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import signal
import sys
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gramfuse_cli.main import main
from gramfuse_cli.show import results as terminal
from gramfuse_protocol.contract.plan import Plan
from gramfuse_server.report import merged_model as written
from gramfuse_server.report.page import charts
from gramfuse_server.report.page import page as pages
from gramfuse_server.report.schema import SCHEMA, Measured, Report
from gramfuse_server.report.verdicts import check_of

SILOS = ["hospital", "bank", "telephone"]
LABELS = [f"label-{number}" for number in range(64)]
VOID = {"meta", "br", "hr", "img", "link", "input"}
DIGEST = "ab" * 32
HOSTILE = "<script>alert('x')</script><img src=x onerror=y>\"'&"


class Checked(HTMLParser):
    """What a page holds; raises AssertionError where a tag is left open, or closed that was not opened."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: dict[str, list[str]] = {}
        self._open: list[str] = []
        self.feed(text)
        self.close()
        assert not self._open

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        names = [name for name, _ in attributes]
        assert len(set(names)) == len(names)
        self.tags.append((tag, dict(attributes)))
        if tag not in VOID:
            self._open.append(tag)
            self.words.setdefault(tag, []).append("")

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        for tag in self._open:
            self.words[tag][-1] += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]

    @property
    def text(self) -> str:
        (body,) = self.words["body"]
        return body


def page(report: dict[str, Any], plan: Plan | None) -> str:
    return pages.page(Report.read(report), plan)


def card(plan: Plan, silos: list[str], model: dict[str, Any]) -> str:
    return written.card(plan, silos, Measured.read(model))


def show_models(report: dict[str, Any]) -> None:
    terminal.show_models(Report.read(report))


def plan_of(*, secure: bool = False, tasks: bool = False, labels: list[str] = LABELS, rounds: int = 1) -> Plan:
    kind = "" if tasks else f'task = "classification"\nlabels = {json.dumps(labels)}'
    sections = '[[task]]\nname = "tags"\ntask = "token-classification"\nlabels = ["O", "B-x", "I-x"]\n'
    sections += '[[task]]\nname = "count"\ntask = "regression"\n'
    of = dict(zip(SILOS, ("tags", "count", "count"), strict=True))
    roster = "".join(
        f'[[silo]]\nname = "{n}"\n' + (f'task = "{of[n]}"\n' if tasks else "") for n in [*SILOS, "late"][:3]
    )
    late = "" if tasks else '[[silo]]\nname = "late"\n'
    return Plan.parse(
        f'[plan]\nname = "desk"\n[model]\nbase = "bundled:minilm"\nhead = "{"own" if tasks else "same"}"\n{kind}\n'
        f"{sections if tasks else ''}[merge]\nrounds = {rounds}\n"
        f'[privacy]\nsecure-aggregation = {str(secure).lower()}\nmetrics = "{"sum" if secure else "silo"}"\n'
        f"{'' if secure else 'minimum-survivors = 3'}\n{roster}{late}"
    )


def measured(name: str, kind: str, value: float, *, silos: bool = True, labels: list[str] = LABELS) -> dict[str, Any]:
    model: dict[str, Any] = {"name": name, "kind": kind}
    model["metrics"] = {"examples": 120.0, "accuracy": value, "macro-f1": value - 0.0123, "mcc": value - 0.3}
    model["labels"] = {"": {of: {"examples": 3.0, "precision": 0.5, "recall": 0.25, "f1": value} for of in labels}}
    if silos:
        model["silos"] = {
            silo: {"examples": 40.0, "accuracy": value + 0.01 * place, "macro-f1": 0.4, "mcc": -0.2}
            for place, silo in enumerate(SILOS)
        }
    return model


def base_of(plan: Plan, mode: str) -> dict[str, Any]:
    outcomes = ["clean", "jitter", "empty", "mean"] if mode == "secure" else ["clean"]
    values = [300.5, 18.25, 0.9375] if mode == "secure" else [0.9375]
    return {
        "schema": SCHEMA,
        "run": "desk-1",
        "name": "desk",
        "plan_digest": plan.digest,
        "layout_digest": DIGEST,
        "base": {"name": "bundled:minilm", "sha256": DIGEST},
        "auto_class": "AutoModelForSequenceClassification",
        "head": plan.model.head,
        "tasks": {name: task.task for name, task in plan.tasks.items()},
        "generation": {},
        "mode": mode,
        "identities": "those of the plan" if mode == "secure" else "made for this run",
        "silos": [{"name": silo, "examples": None if mode == "secure" else 100} for silo in SILOS],
        "examples": 300,
        "lost": [],
        "models": [],
        "unmeasured": None,
        "solve": [
            {"group": f"layer.{place}", "outcome": outcome, "jitter": 2e-6, "smallest_eigenvalue": 0.01}
            | {"dead_features": place, "mean_blocks": 1, "blocks": 3, "unused": [4] * place}
            for place, outcome in enumerate(outcomes)
        ],
        "checks": [
            check_of("power", f"layer.{place}", value, (None, 16.0), (None, 256.0)).document()
            for place, value in enumerate(values)
        ],
        "bytes": {silo: {"join": 190, "upload": 241_000_000} for silo in SILOS},
        "bytes_to_silos": {silo: {"join": 8223, "evaluate": 90_100_000} for silo in SILOS},
        "seconds": {"join": 0.264, "train": 4523.3, "evaluate": 38.6},
        "rounds": [],
        "versions": {"gramfuse": "0.1.0", "flwr": "1.41.0", "torch": "2.13.0", "transformers": "5.24.0"},
    }


def open_run() -> tuple[dict[str, Any], Plan]:
    plan = plan_of(rounds=2)
    report = base_of(plan, "open")
    models = [measured(silo, "silo", 0.31 + 0.1 * place) for place, silo in enumerate(SILOS)]
    models += [measured("simple", "simple", 0.611), measured("regmean", "regmean", 0.744)]
    compared = measured("fedavg (2 rounds)", "fedavg", 0.7) | {
        "seconds": 90.5,
        "note": "accuracy after each round: 0.6",
    }
    compared |= {"bytes": dict.fromkeys(SILOS, 500_000)}
    report["models"] = [*models, measured("joint", "joint", 0.852) | {"seconds": 61.0}, compared]
    of = {key: report[key] for key in ("lost", "solve", "bytes", "bytes_to_silos", "seconds", "unmeasured")}
    first = [measured("simple", "simple", 0.522), measured("regmean", "regmean", 0.633)]
    report["rounds"] = [{"round": 1, "models": first, **of}, {"round": 2, "models": models, **of}]

    def trial(score: float | None) -> dict[str, Any]:
        return {"score": score, "metrics": {} if score is None else {"accuracy": score}}

    report["tuning"] = {
        "metric": "accuracy",
        "part": "validation",
        "examples": dict.fromkeys(SILOS, 20),
        "reported": {"part": "held-out", "examples": dict.fromkeys(SILOS, 40)},
        "alpha": [{"alpha": alpha, **trial(score)} for alpha, score in ((0.0, 0.611), (0.5, 0.733), (1.0, None))],
        "weights": [{"weights": dict.fromkeys(SILOS, 1.0) | {"bank": w}, **trial(0.7 + w / 8)} for w in (1.0, 0.5)],
        "order": [{"silos": SILOS[:n], **trial(0.2 * n)} for n in (1, 2, 3)],
        "influence": [
            {"silo": silo, "without": 0.7, "difference": -0.0333, "reported": {"accuracy": 0.0444}} for silo in SILOS
        ],
        "chosen": {"alpha": 0.5, "weights": dict.fromkeys(SILOS, 1.0) | {"bank": 0.5}, **trial(0.733)},
    }
    return report, plan


def secure_run() -> tuple[dict[str, Any], Plan]:
    plan = plan_of(secure=True)
    models = [measured("simple", "simple", 0.611, silos=False), measured("regmean", "regmean", 0.744, silos=False)]
    lost = [
        {"name": "late", "reason": "silo 'late' went away in phase 'masked'"},
        {"name": "bank", "reason": "silo 'bank' refused in phase 'evaluate': its disk is full"},
    ]
    return base_of(plan, "secure") | {"models": models, "lost": lost}, plan


def failed_run() -> tuple[dict[str, Any], Plan]:
    report, plan = secure_run()
    for key in ("models", "unmeasured", "solve", "checks", "examples"):
        del report[key]
    states = ("trained", "joined", "lost", "absent")
    report["silos"] = [{"name": name, "state": state} for name, state in zip(plan.names, states, strict=True)]
    message = "2 silos are left where the plan asks for 3; lost: late (silo 'late' went away)"
    report["failure"] = {"error": "FederationError", "message": message, "phase": "masked", "round": 1}
    report["failure"] |= {"exit_code": 16, "resumable": True}
    return report, plan


def own_heads() -> tuple[dict[str, Any], Plan]:
    plan = plan_of(tasks=True)

    def model(name: str, kind: str, f1: float, r: float) -> dict[str, Any]:
        tags = {"examples": 40.0, "entity-f1": f1, "precision": 0.9, "recall": 0.3, "macro-f1": f1}
        counts = {"examples": 80.0, "pearson": r, "rmse": 0.2219, "mae": 0.1818}
        return {
            "name": name,
            "kind": kind,
            "metrics": {"examples": 120.0, "mean-score": (f1 + r) / 2},
            "tasks": {"tags": tags, "count": counts},
            "labels": {"tags": {"x": {"examples": 9.0, "precision": 0.9, "recall": 0.3, "f1": f1}}},
            "silos": {"hospital": tags, "bank": counts, "telephone": counts},
        }

    models = [model(silo, "body", 0.3, -0.25) for silo in SILOS]
    models += [model("alone", "alone", 0.5, 0.6), model("simple", "simple", 0.45, 0.2)]
    report = base_of(plan, "open") | {"models": [*models, model("regmean", "regmean", 0.55, 0.65)]}
    return report | {"auto_class": "AutoModel"}, plan


def merged_files() -> tuple[dict[str, Any], None]:
    report = base_of(plan_of(), "files")
    for key in ("name", "auto_class", "head", "tasks", "generation", "identities", "lost", "models", "unmeasured"):
        del report[key]
    for key in ("rounds", "bytes", "bytes_to_silos"):
        del report[key]
    added = {"kept": [{"token": "<b>", "silos": SILOS[:2]}], "left_out": [{"token": "<c d>", "silos": SILOS[2:]}]}
    report |= {"closed": 0.9, "unmatched": [], "added_tokens": added, "left_out": ["test.jsonl, line 2: no label"]}
    silos = [{"name": s, "examples": 100, "weight": 1.0, "sha256": DIGEST, "auto_class": "AutoModel"} for s in SILOS]
    return report | {"silos": silos, "heads": "own", "alpha": 0.7, "weighting": "examples", "seconds": 3.2}, None


RUNS = [open_run, secure_run, failed_run, own_heads, merged_files]


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
        assert ("do not use the model." in shown) is bad
        assert (shown.rindex("Checks of the merge") < shown.rindex("What was merged")) is bad
    report, plan = open_run()
    report["rounds"][0]["checks"] = [check_of("ratio", "layer.7", 9.125, (None, 8.0), (None, None)).document()]
    assert "9.125" in Checked(page(report, plan)).text, "what is odd in an earlier round is told too"


def test_what_a_failed_run_says_comes_first() -> None:
    report, plan = failed_run()
    shown = Checked(page(report, plan)).text
    assert shown.index("desk: the run failed") < shown.index(report["failure"]["message"])
    assert shown.index(report["failure"]["message"]) < shown.rindex("What was to be merged")
    for words in ("silos upload, masked", "gramfuse explain 16", "--resume desk-1", "had trained", "did not come"):
        assert words in shown
    for words in ("from_pretrained", "sha256sum", "in the merge", "Whoever gets the merged model"):
        assert words not in shown
    assert "No sum was opened" in shown
    report["failure"] |= {"phase": "evaluate", "resumable": False}
    assert "No sum was opened" not in page(report, plan)
    assert "--resume" not in page(report, plan)


def test_the_page_says_who_saw_what_as_the_plan_has_it() -> None:
    secure, opened, own = (Checked(page(*run())).text for run in (secure_run, open_run, own_heads))
    assert "the sum over 3 silos" in secure
    assert "This holds as long as at most 1 silo works together with the coordinator" in secure
    assert "simulation" not in secure
    assert "Of each silo by itself: Gram matrices" in opened
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
    assert "and with noise" in Checked(page(report, plan)).text


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
    assert "was changed since the run wrote it" in gramfuse("report", run)[1]["error"]["message"]
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
