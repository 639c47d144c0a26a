"""The digest of a plan and what it binds."""

from __future__ import annotations

import hashlib
import math
from typing import Any

import pytest

from gramfuse_protocol.canonical import canonical_json
from gramfuse_protocol.contract.plan import Plan
from gramfuse_protocol.contract.plan_sections import Lora
from tests.protocol.plan.canonical import canonical
from tests.protocol.plan.plans import EVERY_KEY, NODE_KEY, SMALL, TASKS

SMALL_CANONICAL = (
    '{"merge":{"alpha":"0.9","context-free":"mean","exclude":[],"experts":null,"gram":{"*":"full"},"layout":null,"maximum-change":"32.0","method":"regmean","refit":false,"rounds":1,'
    '"tokens":100000,"weighting":"uniform"},'
    '"model":{"adapters":null,"base":"bundled:minilm","centre":"0.0","config":null,"first-token":null,"head":null,"labels":["no","yes"],"max-length":128,"pair":false,'
    '"processor":null,"range":null,"revision":null,"scale":"1.0","sha256":null,"target-length":32,"task":"classification","threshold":"0.5"},'
    '"plan":{"name":"small","version":1},'
    '"privacy":{"candidates":["simple","regmean"],"colluding":1,"metrics":"sum","metrics-epsilon":"2.0","minimum-survivors":null,"secure-aggregation":false,"threshold":null},'
    '"silo":[{"labels":[],"name":"a","node-key":null,"public-key":null,"task":null},'
    '{"labels":[],"name":"b","node-key":null,"public-key":null,"task":null}],"task":[],'
    '"training":{"batch-size":16,"epochs":5,"freeze":["embeddings"],"learning-rate":"5e-05","lora":null,"precision":"float32","seed":1,"warmup":"0.06",'
    '"weight-decay":"0.01"}}'
)

SMALL_DIGEST = "ed2fb785291f7d3f3864a2530e247b0cf2e912afdca176e664c70cdfde6b9ce3"


def leaves(document: Any, path: tuple[Any, ...] = ()) -> dict[tuple[Any, ...], Any]:
    if isinstance(document, dict):
        return {p: v for key, value in document.items() for p, v in leaves(value, (*path, key)).items()}
    return {path: document}


def test_the_digest_of_the_small_plan_is_the_golden_vector() -> None:
    plan = Plan.parse(SMALL)
    assert canonical_json(plan.document()).decode() == SMALL_CANONICAL
    assert plan.digest == hashlib.sha256(SMALL_CANONICAL.encode()).hexdigest() == SMALL_DIGEST


@pytest.mark.parametrize("text", [SMALL, EVERY_KEY], ids=["defaults", "every key"])
def test_an_independent_canonicaliser_gets_the_same_digest(text: str) -> None:
    plan = Plan.parse(text)
    assert plan.digest == hashlib.sha256(canonical(plan.document()).encode()).hexdigest()


def test_the_digest_does_not_depend_on_how_the_plan_is_written() -> None:
    spelled_out = """
    silo = [{ name = "a" }, { name = 'b' }]   # the same plan, written differently
    privacy = { metrics = "sum", secure-aggregation = false }
    model.labels = ["no", "yes"]
    model.task = "classification"
    model.base = "bundled:\\u006dinilm"
    plan.name = "small"
    training.learning-rate = 0.000_05
    merge.alpha = 9e-1
    """
    assert Plan.parse(spelled_out).digest == SMALL_DIGEST


CHANGED: dict[tuple[str, ...], Any] = {
    ("plan", "name"): "smalk",
    ("plan", "version"): 2,
    ("model", "base"): "bundled:minilm2",
    ("model", "sha256"): "0" * 64,
    ("model", "task"): "regression",
    ("model", "labels"): ["yes", "no"],
    ("model", "pair"): True,
    ("model", "config"): "0" * 64,
    ("model", "processor"): "0" * 64,
    ("model", "adapters"): "0" * 64,
    ("model", "revision"): "0" * 40,
    ("model", "head"): "own",
    ("model", "target-length"): 33,
    ("model", "threshold"): 0.4,
    ("model", "range"): (0.0, 1.0),
    ("model", "centre"): 0.5,
    ("model", "scale"): 2.0,
    ("model", "first-token"): "de_DE",
    ("model", "max-length"): 127,
    ("training", "epochs"): 6,
    ("training", "learning-rate"): math.nextafter(5e-5, 1),
    ("training", "batch-size"): 17,
    ("training", "warmup"): math.nextafter(0.06, 1),
    ("training", "weight-decay"): 0.0,
    ("training", "precision"): "bfloat16",
    ("training", "seed"): 0,
    ("training", "freeze"): [],
    ("training", "lora"): Lora(),
    ("merge", "method"): "other",
    ("merge", "refit"): True,
    ("merge", "alpha"): math.nextafter(0.9, 0),
    ("merge", "weighting"): "examples",
    ("merge", "gram", "*"): "diagonal",
    ("merge", "exclude"): ["*"],
    ("merge", "context-free"): "full",
    ("merge", "experts"): "full",
    ("merge", "tokens"): 99_999,
    ("merge", "layout"): "0" * 64,
    ("merge", "rounds"): 2,
    ("merge", "maximum-change"): math.nextafter(32, 0),
    ("privacy", "secure-aggregation"): True,
    ("privacy", "colluding"): 0,
    ("privacy", "threshold"): 2,
    ("privacy", "minimum-survivors"): 2,
    ("privacy", "metrics"): "none",
    ("privacy", "metrics-epsilon"): 1.0,
    ("privacy", "candidates"): ["regmean"],
    ("silo",): [{"name": "b"}, {"name": "a"}],
    ("task",): [],
}


def test_the_digest_changes_when_any_key_changes() -> None:
    plan = Plan.parse(SMALL)
    assert set(CHANGED) == set(leaves(plan.document())), "a key of the plan has no change here"
    digests = {plan.digest}
    for path, value in CHANGED.items():
        # Validation is left out on purpose: some keys have one legal value today and must be bound all the same.
        section = plan if len(path) == 1 else getattr(plan, path[0])
        name = path[min(1, len(path) - 1)].replace("-", "_")
        if len(path) == 3:
            value = {path[2]: value}
        elif path == ("silo",):
            value = tuple(reversed(plan.silo))
        elif path == ("task",):
            value = Plan.parse(TASKS).task
        changed = section.model_copy(update={name: tuple(value) if isinstance(value, list) else value})
        digests.add((changed if section is plan else plan.model_copy(update={path[0]: changed})).digest)
    keys = [plan.with_keys({"a": "0" * 64, "b": other * 64}) for other in "12"]
    node_key = plan.silo[0].model_copy(update={"node_key": NODE_KEY})
    keys.append(plan.model_copy(update={"silo": (node_key, *plan.silo[1:])}))
    digests |= {keyed.digest for keyed in keys}
    assert len(digests) == 1 + len(CHANGED) + len(keys)


ADAPTERS: dict[str, Any] = {
    "rank": 17,
    "alpha": 33.0,
    "rslora": True,
    "targets": ("query",),
    "modules_to_save": ("pooler",),
    "init": "gaussian",
    "output": "merged",
}


def test_the_digest_changes_when_any_key_of_the_adapters_changes() -> None:
    assert set(ADAPTERS) == set(Lora.model_fields)
    plan = Plan.parse(SMALL)
    adapters = [Lora(), *(Lora(**{key: value}) for key, value in ADAPTERS.items())]
    trainings = [plan.training.model_copy(update={"lora": lora}) for lora in adapters]
    digests = {plan.model_copy(update={"training": training}).digest for training in trainings}
    assert len(digests) == 1 + len(ADAPTERS)
