"""Reports of runs of every kind, their pages, and what a page holds."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from typing import Any

from gramfuse_cli.show import results as terminal
from gramfuse_protocol.contract.plan import Plan
from gramfuse_server.report import merged_model as written
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
        "outputs": ["model"],
        "head": plan.model.head or "same",
        "merged": "regmean",
        "unfitted": None,
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
        {"name": "late", "reason": "silo 'late' disconnected in phase 'masked'"},
        {"name": "bank", "reason": "silo 'bank' refused in phase 'evaluate': its disk is full"},
    ]
    return base_of(plan, "secure") | {"models": models, "lost": lost}, plan


def failed_run() -> tuple[dict[str, Any], Plan]:
    report, plan = secure_run()
    for key in ("models", "unmeasured", "solve", "checks", "examples"):
        del report[key]
    states = ("trained", "joined", "lost", "absent")
    report["silos"] = [{"name": name, "state": state} for name, state in zip(plan.names, states, strict=True)]
    message = "2 silos are left, but the plan requires 3; lost: late (silo 'late' disconnected)"
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
    for key in (
        "name",
        "auto_class",
        "head",
        "tasks",
        "generation",
        "identities",
        "merged",
        "unfitted",
        "lost",
        "models",
        "unmeasured",
    ):
        del report[key]
    for key in ("rounds", "bytes", "bytes_to_silos"):
        del report[key]
    added = {"kept": [{"token": "<b>", "silos": SILOS[:2]}], "left_out": [{"token": "<c d>", "silos": SILOS[2:]}]}
    report |= {
        "truncated": {},
        "closed": 0.9,
        "unmatched": [],
        "added_tokens": added,
        "left_out": ["test.jsonl, line 2: no label"],
    }
    silos = [{"name": s, "examples": 100, "weight": 1.0, "sha256": DIGEST, "auto_class": "AutoModel"} for s in SILOS]
    return report | {"silos": silos, "heads": "own", "alpha": 0.7, "weighting": "examples", "seconds": 3.2}, None


RUNS = [open_run, secure_run, failed_run, own_heads, merged_files]
