"""The plan: what is refused, what its digest binds, and the canonical form that the digest is taken of."""

from __future__ import annotations

import enum
import hashlib
import math
import tomllib
from decimal import ROUND_CEILING, ROUND_FLOOR, Context, Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from hypothesis import given
from hypothesis import strategies as st

from gramfuse_protocol.canonical import canonical_json, digest
from gramfuse_protocol.contract.plan import Plan
from gramfuse_protocol.contract.plan_sections import Pins
from gramfuse_protocol.errors import PlanError

SMALL = """
[plan]
name = "small"

[model]
base = "bundled:minilm"
task = "classification"
labels = ["no", "yes"]

[privacy]
secure-aggregation = false

[[silo]]
name = "a"

[[silo]]
name = "b"
"""

# The generator of P-384 is a public key: its private half is 1.
NODE_KEY = (
    "ecdsa-sha2-nistp384 AAAAE2VjZHNhLXNoYTItbmlzdHAzODQAAAAIbmlzdHAzODQAAABhBKqHyiK+iwU3jrHHHvMgrXRu"
    "HTtii6ebmFn3QeCCVCo4VQLyXb9VKWw6VF44cnYKtzYX3kqWJixvXZ6Yv5KS3Cn49B29KJoUfOnaMRO18LjACmCxzh1+gZ16Qx18kOoOXw=="
)

EVERY_KEY = (
    """
# another order than the plan writes
silo = [{labels = ["é"], node-key = "NODE", public-key = "KEY", name = "north-1"}, {name = "south"}]
task = []

[privacy]
candidates = ["regmean"]
metrics-epsilon = "none"
metrics = "none"
minimum-survivors = 2
threshold = 9007199254740991
colluding = 0
secure-aggregation = false

[merge]
rounds = 3
maximum-change = 2.5
tokens = 4096
layout = "LAYOUT"
gram = {"*" = "diagonal", "*.query.weight" = "block:8", "*\\"ö\\u4e00*" = "full"}
exclude = ["*pooler*"]
context-free = "diagonal"
experts = "mean"
weighting = "examples"
alpha = 1
method = "regmean"

[training]
freeze = []
seed = 4294967295
weight-decay = 0
precision = "bfloat16"
warmup = 1e-17
batch-size = 1
learning-rate = 3.0000000000000004e-5
epochs = 9

[model]
head = "different"
threshold = 0.3
centre = 0
scale = 1
range = [-2.5, 1e300]
target-length = 9
config = "SHA256"
processor = "SHA256"
revision = "COMMIT"
pair = true
max-length = 7
task = "classification"
labels = [" ", "quoted \\"x\\"", "back\\\\nslash", "é", "e\\u0301", "\\U0001F600"]
sha256 = "SHA256"
base = "../models/tïny"

[plan]
version = 12
name = "every-key"
""".replace("LAYOUT", "0" * 63 + "f")
    .replace("SHA256", "ab" * 32)
    .replace("COMMIT", "cd" * 20)
    .replace("KEY", "2" * 64)
    .replace("NODE", NODE_KEY)
)

TASKS = """
[plan]
name = "tasks"

[model]
base = "bundled:minilm"
head = "own"

[[task]]
name = "mail"
task = "classification"
labels = ["no", "yes"]
pair = true
max-length = 9
target-length = 9
threshold = 0.3
centre = 0
scale = 1
range = [0, 5]

[[task]]
name = "names"
task = "token-classification"
labels = ["O", "B-X", "I-X"]

[privacy]
secure-aggregation = false
metrics = "silo"

[[silo]]
name = "a"
task = "names"

[[silo]]
name = "b"
task = "mail"
"""

ANSWERS = """
[plan]
name = "answers"

[model]
base = "bundled:minilm"
task = "sequence-to-sequence"
first-token = "de_DE"

[privacy]
secure-aggregation = false

[[silo]]
name = "a"
"""

PINS = Pins("1" * 64, "3" * 64, "4" * 64)

SMALL_CANONICAL = (
    '{"merge":{"alpha":"0.9","context-free":"mean","exclude":[],"experts":null,"gram":{"*":"full"},"layout":null,"maximum-change":"32.0","method":"regmean","rounds":1,'
    '"tokens":100000,"weighting":"uniform"},'
    '"model":{"base":"bundled:minilm","centre":"0.0","config":null,"first-token":null,"head":"same","labels":["no","yes"],"max-length":128,"pair":false,'
    '"processor":null,"range":null,"revision":null,"scale":"1.0","sha256":null,"target-length":32,"task":"classification","threshold":"0.5"},'
    '"plan":{"name":"small","version":1},'
    '"privacy":{"candidates":["simple","regmean"],"colluding":1,"metrics":"sum","metrics-epsilon":"2.0","minimum-survivors":null,"secure-aggregation":false,"threshold":null},'
    '"silo":[{"labels":[],"name":"a","node-key":null,"public-key":null,"task":null},'
    '{"labels":[],"name":"b","node-key":null,"public-key":null,"task":null}],"task":[],'
    '"training":{"batch-size":16,"epochs":5,"freeze":["embeddings"],"learning-rate":"5e-05","precision":"float32","seed":1,"warmup":"0.06",'
    '"weight-decay":"0.01"}}'
)
SMALL_DIGEST = "e4b6d63f3f801072f965e52551a9fa2ed5d167adfa203ad85eb2015d9a277df5"


def _edit(text: str, old: str, new: str) -> str:
    assert text.count(old) == 1, f"{old!r} is not once in the plan"
    return text.replace(old, new)


def _leaves(document: Any, path: tuple[Any, ...] = ()) -> dict[tuple[Any, ...], Any]:
    if isinstance(document, dict):
        return {p: v for key, value in document.items() for p, v in _leaves(value, (*path, key)).items()}
    return {path: document}


# An independent canonicaliser: RFC 8785 with floats as strings, written without json or the code under test.

_WIDE = Context(prec=1100, Emin=-2000, Emax=2000)
_SHORT = {0x08: "\\b", 0x09: "\\t", 0x0A: "\\n", 0x0C: "\\f", 0x0D: "\\r", 0x22: '\\"', 0x5C: "\\\\"}


def _quote(text: str) -> str:
    return '"' + "".join(_SHORT.get(ord(c)) or (f"\\u{ord(c):04x}" if ord(c) < 32 else c) for c in text) + '"'


def _utf16(text: str) -> list[int]:
    units = []
    for point in map(ord, text):
        high, low = divmod(point - 0x10000, 0x400)
        units += [point] if point < 0x10000 else [0xD800 + high, 0xDC00 + low]
    return units


def _shortest(value: float) -> str:
    """The fewest significant digits that read back to the same float, laid out as Python writes floats."""
    if value == 0:
        return "-0.0" if math.copysign(1, value) < 0 else "0.0"
    exact = Decimal(value)
    for digits in range(1, 18):
        unit = Decimal(1).scaleb(exact.adjusted() - digits + 1)
        both = [exact.quantize(unit, rounding, _WIDE) for rounding in (ROUND_FLOOR, ROUND_CEILING)]
        if fitting := [decimal for decimal in both if float(decimal) == value]:
            break
    nearest = min(fitting, key=lambda d: (abs(_WIDE.subtract(d, exact)), d.as_tuple().digits[-1] % 2))
    decimal = nearest.normalize()
    sign, point = "-" * (value < 0), decimal.adjusted() + 1
    digits = "".join(map(str, decimal.as_tuple().digits))
    if not -4 < point <= 16:
        fraction = f".{digits[1:]}" if digits[1:] else ""
        return f"{sign}{digits[0]}{fraction}e{point - 1:+03}"
    digits = digits.rjust(len(digits) + max(0, 1 - point), "0").ljust(point + 1, "0")
    point = max(point, 1)
    return f"{sign}{digits[:point]}.{digits[point:]}"


def _canonical(value: Any) -> str:
    match value:
        case None | bool():
            return {None: "null", True: "true", False: "false"}[value]
        case int():
            return str(value)
        case float():
            return _quote(_shortest(value))
        case str():
            return _quote(value)
        case dict():
            return "{" + ",".join(f"{_quote(k)}:{_canonical(value[k])}" for k in sorted(value, key=_utf16)) + "}"
        case _:
            return "[" + ",".join(map(_canonical, value)) + "]"


# Reading and writing


@pytest.mark.parametrize("text", [SMALL, EVERY_KEY, TASKS, ANSWERS], ids=["defaults", "every key", "tasks", "answers"])
def test_a_plan_written_and_read_again_is_equal_and_has_the_same_digest(text: str, tmp_path: Path) -> None:
    plan = Plan.parse(text)
    path = tmp_path / "plan.toml"
    path.write_text(plan.to_toml(), encoding="utf-8")
    again = Plan.read(path)
    assert again == plan
    assert again.digest == plan.digest
    assert again.to_toml() == plan.to_toml()


def test_the_plan_of_every_key_has_every_key() -> None:
    def keys(document: Any, path: str = "") -> set[str]:
        if isinstance(document, list):
            return {path}.union(*(keys(item, path) for item in document if isinstance(item, dict)))
        if not isinstance(document, dict) or path == ".merge.gram":
            return {path}
        return set().union(*(keys(value, f"{path}.{key}") for key, value in document.items()))

    texts = (EVERY_KEY, TASKS, ANSWERS)
    written = set().union(*(keys(tomllib.loads(text)) for text in texts))
    known = set().union(*(keys(Plan.parse(text).document()) for text in texts))
    assert written == known - {".task.first-token"}, "a model that answers has no head of its own"


def test_values_arrive_as_written() -> None:
    plan = Plan.parse(EVERY_KEY)
    assert plan.names == ("north-1", "south")
    assert plan.locked
    assert plan.training.learning_rate == 3.0000000000000004e-5
    assert plan.model.labels == (" ", 'quoted "x"', "back\\nslash", "\u00e9", "e\u0301", "\U0001f600")
    assert dict(plan.merge.gram) == {"*": "diagonal", "*.query.weight": "block:8", '*"ö\u4e00*': "full"}


@pytest.mark.parametrize(
    ("insert", "key", "known"),
    [
        ("top = 1\n[plan]", "top", "plan, model, task, training, merge, privacy, silo"),
        ("[plan]\ntitle = 1", "plan.title", "name, version"),
        (
            "[model]\ntokenizer = 'x'",
            "model.tokenizer",
            "base, revision, sha256, config, processor, task, head, labels, pair, max-length, target-length, "
            "first-token, threshold, centre, scale, range",
        ),
        (
            "[training]\nlearning-rat = 1.0",
            "training.learning-rat",
            "epochs, learning-rate, batch-size, warmup, weight-decay, precision, seed, freeze",
        ),
        (
            "[merge]\nbeta = 1",
            "merge.beta",
            "method, alpha, weighting, gram, exclude, context-free, experts, tokens, rounds, maximum-change, layout",
        ),
        (
            "[privacy]\nnoise = {x = 1}",
            "privacy.noise",
            "secure-aggregation, colluding, threshold, minimum-survivors, metrics, metrics-epsilon, candidates",
        ),
        ("[[silo]]\ncolour = 1", "silo.0.colour", "name, public-key, node-key, task, labels"),
    ],
)
def test_an_unknown_key_is_refused_with_file_key_and_the_known_keys(
    insert: str, key: str, known: str, tmp_path: Path
) -> None:
    table = next(line for line in insert.splitlines() if line.startswith("["))
    text = SMALL.replace(table, insert, 1) if table in SMALL else f"{insert}\n{SMALL}"
    path = tmp_path / "plan.toml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(PlanError) as caught:
        Plan.read(path)
    assert str(caught.value) == f"{path}: unknown key {key!r}; known here: {known}"


@pytest.mark.parametrize("key", ["secure_aggregation", "Secure-Aggregation"])
def test_a_key_in_another_spelling_is_an_unknown_key(key: str) -> None:
    with pytest.raises(PlanError, match=f"unknown key 'privacy.{key}'"):
        Plan.parse(_edit(SMALL, "secure-aggregation", key))


def test_an_unknown_key_in_the_only_silo_is_the_only_complaint() -> None:
    text = _edit(SMALL, '[[silo]]\nname = "b"\n', "") + "colour = 1\n"
    with pytest.raises(PlanError) as caught:
        Plan.parse(text, "plan.toml")
    assert (
        str(caught.value)
        == "plan.toml: unknown key 'silo.0.colour'; known here: name, public-key, node-key, task, labels"
    )


@pytest.mark.parametrize(
    ("old", "new", "key"),
    [
        ('name = "small"', "name = 3", "plan.name"),
        ('name = "small"', 'name = "Small"', "plan.name"),
        ('name = "small"', 'name = "small\\n"', "plan.name"),
        ('name = "small"', 'name = "small"\nversion = 0', "plan.version"),
        ('name = "small"', 'name = "small"\nversion = "1"', "plan.version"),
        ('name = "small"', 'name = "small"\nversion = true', "plan.version"),
        ('base = "bundled:minilm"', 'base = ""', "model.base"),
        ('base = "bundled:minilm"', "base = 1979-05-27", "model.base"),
        ('base = "bundled:minilm"', 'base = "x"\nsha256 = "AB"', "model.sha256"),
        ('base = "bundled:minilm"', 'base = "x"\npair = 1', "model.pair"),
        ('base = "bundled:minilm"', 'base = "x"\nmax-length = 1', "model.max-length"),
        ('task = "classification"', 'task = "ranking"', "model.task"),
        ('labels = ["no", "yes"]', 'labels = "yes"', "model.labels"),
        ('labels = ["no", "yes"]', 'labels = ["no", 1]', "model.labels.1"),
        ("[privacy]", "[training]\nepochs = 1.0\n[privacy]", "training.epochs"),
        ("[privacy]", "[training]\nlearning-rate = 0\n[privacy]", "training.learning-rate"),
        ("[privacy]", "[training]\nlearning-rate = nan\n[privacy]", "training.learning-rate"),
        ("[privacy]", "[training]\nlearning-rate = inf\n[privacy]", "training.learning-rate"),
        ("[privacy]", "[training]\nwarmup = 1.01\n[privacy]", "training.warmup"),
        ("[privacy]", "[training]\nseed = 4294967296\n[privacy]", "training.seed"),
        ("[privacy]", '[training]\nfreeze = "*"\n[privacy]', "training.freeze"),
        ("[privacy]", '[merge]\nalpha = "0.9"\n[privacy]', "merge.alpha"),
        ("[privacy]", '[merge]\nmethod = "fisher"\n[privacy]', "merge.method"),
        ("[privacy]", '[merge]\ngram = "full"\n[privacy]', "merge.gram"),
        ("[privacy]", '[merge.gram]\n"*" = 8\n[privacy]', "merge.gram.*"),
        ("[privacy]", '[merge.gram]\n"*" = "block:0"\n[privacy]', "block:0"),
        ("secure-aggregation = false", "secure-aggregation = 0", "privacy.secure-aggregation"),
        ("secure-aggregation = false", 'secure-aggregation = false\nmetrics = "all"', "privacy.metrics"),
        ("secure-aggregation = false", "secure-aggregation = false\ncolluding = -1", "privacy.colluding"),
        ("secure-aggregation = false", "secure-aggregation = false\nthreshold = 0", "privacy.threshold"),
        ("secure-aggregation = false", "secure-aggregation = false\nthreshold = 1.0", "privacy.threshold"),
        ("secure-aggregation = false", "minimum-survivors = 0", "privacy.minimum-survivors"),
        (
            "secure-aggregation = false",
            "secure-aggregation = false\nminimum-survivors = 3",
            "privacy.minimum-survivors",
        ),
        ('name = "b"', 'name = "b"\npublic-key = "AB"', "silo.1.public-key"),
        ('name = "b"', 'name = "b"\nnode-key = "AB"', "silo.1.node-key"),
        ('name = "b"', 'name = "-b"', "silo.1.name"),
        ('name = "b"', "", "silo.1.name"),
    ],
)
def test_a_value_of_the_wrong_type_or_range_is_refused_naming_file_and_key(old: str, new: str, key: str) -> None:
    with pytest.raises(PlanError) as caught:
        Plan.parse(_edit(SMALL, old, new), "dir/plan.toml")
    (line,) = str(caught.value).splitlines()
    assert line.startswith("dir/plan.toml: ")
    assert f"'{key}'" in line


@pytest.mark.parametrize(
    ("section", "key"),
    [("[plan]", "version"), ("[training]", "epochs"), ("[training]", "batch-size"), ("[merge]", "tokens")],
)
def test_an_integer_without_canonical_form_is_refused_with_the_file_not_when_the_digest_is_taken(
    section: str, key: str
) -> None:
    line = f"{section}\n{key} = {2**53}"
    text = _edit(SMALL, section, line) if section in SMALL else f"{line}\n{SMALL}"
    with pytest.raises(PlanError, match=rf"plan.toml: .*{key}"):
        Plan.parse(text, "plan.toml")


def test_every_problem_of_a_file_is_listed() -> None:
    text = _edit(_edit(SMALL, 'name = "small"', "name = 1"), "aggregation = false", "aggregation = 0\nmetrics = 2")
    with pytest.raises(PlanError) as caught:
        Plan.parse(text, "plan.toml")
    lines = str(caught.value).splitlines()
    assert [line.split("'")[1] for line in lines] == ["plan.name", "privacy.secure-aggregation", "privacy.metrics"]
    assert all(line.startswith("plan.toml: ") for line in lines)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('labels = ["no", "yes"]', 'labels = ["no", "yes", "no"]', "'model': a label is listed twice"),
        ('labels = ["no", "yes"]', 'labels = ["no"]', "needs at least two labels"),
        ('task = "classification"', 'task = "regression"', "task 'regression' has no labels"),
        ('task = "classification"', 'task = "classification"\ncentre = 1', "has no targets with a 'centre'"),
        ('task = "classification"', 'task = "classification"\nfirst-token = "de"', "generates no texts"),
        ('name = "b"', 'name = "a"', r"\[\[silo\]\] names a more than once"),
        ("secure-aggregation = false", "secure-aggregation = true", "secure aggregation of 2 silos hides nothing"),
        ("secure-aggregation = false", "", "secure aggregation of 2 silos hides nothing"),
    ],
    ids=lambda text: None,
)
def test_what_contradicts_itself_is_refused(old: str, new: str, message: str) -> None:
    with pytest.raises(PlanError, match=f"^plan.toml: .*{message}"):
        Plan.parse(_edit(SMALL, old, new), "plan.toml")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('head = "own"', 'head = "same"', "silos share a body and keep their heads: 'model.head' must be \"own\""),
        ('head = "own"', 'head = "own"\ntask = "regression"', "'model.task' stands in each"),
        ('task = "mail"', 'task = "post"', "'b' needs 'task', one of mail, names"),
        ('task = "mail"', 'task = "names"', "no \\[\\[silo\\]\\] has the task mail"),
        ('name = "names"', 'name = "mail"', "gives one name twice"),
        ('metrics = "silo"', 'metrics = "sum"', "do not add up over silos"),
        ('task = "token-classification"\nlabels = ["O", "B-X", "I-X"]', 'task = "causal-lm"', "has no head of its own"),
        ('labels = ["O", "B-X", "I-X"]', 'labels = ["O", "B-X"]', "IOB2"),
        ('labels = ["O", "B-X", "I-X"]', 'labels = ["O", "X", "B-X", "I-X"]', "IOB2.*'X'"),
        ('task = "mail"', 'task = "mail"\nlabels = ["no"]', "'labels' of a .*needs 'model.task'"),
    ],
)
def test_tasks_that_do_not_fit_together_are_refused(old: str, new: str, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        Plan.parse(_edit(TASKS, old, new))


def test_each_silo_has_its_task() -> None:
    plan = Plan.parse(TASKS)
    assert plan.task_of("a").task == "token-classification"
    assert plan.task_of("b").labels == ("no", "yes")
    with pytest.raises(PlanError, match=r"no \[\[silo\]\] 'c'"):
        plan.task_of("c")


def masked(held: str, silos: int = 4, **privacy: Any) -> str:
    """A plan in which all silos annotate `no` and those named also `yes`."""
    lines = [f"{key.replace('_', '-')} = {value}" for key, value in privacy.items()]
    roster = "".join(
        f'[[silo]]\nname = "{name}"\n' + ("" if name in held else 'labels = ["no"]\n') for name in "abcdefgh"[:silos]
    )
    return _edit(SMALL.partition("[[silo]]")[0], "secure-aggregation = false", "\n".join(lines)) + roster


def test_a_label_that_few_silos_annotate_would_be_a_sum_over_few() -> None:
    plan = Plan.parse(masked("a", secure_aggregation="false"))
    assert plan.holders("yes") == ("a",)
    assert plan.task_of("a").annotated == (0, 1)
    assert plan.task_of("b").annotated == (0,)
    # One may drop out and one collude: of three that are left, two must be honest.
    for held in ("ab", "abc"):
        with pytest.raises(PlanError, match=f"'yes' is annotated by {len(held)} silos.*at least 4"):
            Plan.parse(masked(held))
    assert Plan.parse(masked("abcd")).holders("yes") == ("a", "b", "c", "d")
    assert len(Plan.parse(masked("abc", minimum_survivors=4, colluding=1)).holders("yes")) == 3
    with pytest.raises(PlanError, match="annotated by 0 silos"):
        Plan.parse(masked("", secure_aggregation="false"))


def test_a_plan_needs_a_silo() -> None:
    with pytest.raises(PlanError, match=r"plan.toml: 'silo' is missing"):
        Plan.parse(SMALL[: SMALL.index("[[silo]]")], "plan.toml")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no such file"),
        (b"[plan]\nname = small\n", "not valid TOML: .*line 2"),
        (b"[plan]\nname = 'a'\nname = 'b'\n", "not valid TOML: .*line 3"),
        (b"\xff\xfe", "cannot be read"),
    ],
    ids=["missing", "broken", "key twice", "not UTF-8"],
)
def test_a_file_that_cannot_be_read_is_named(content: bytes | None, message: str, tmp_path: Path) -> None:
    path = tmp_path / "plan.toml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(PlanError, match=message) as caught:
        Plan.read(path)
    assert str(caught.value).startswith(f"{path}: ")


# --set


@pytest.mark.parametrize(
    ("setting", "path", "value"),
    [
        ("merge.alpha=1.0", ("merge", "alpha"), 1.0),
        ("merge.alpha=1", ("merge", "alpha"), 1.0),
        ("merge.weighting=examples", ("merge", "weighting"), "examples"),
        ('merge.weighting = "examples"', ("merge", "weighting"), "examples"),
        ("model.base=bundled:minilm", ("model", "base"), "bundled:minilm"),
        ("model.base=some/path=odd", ("model", "base"), "some/path=odd"),
        ('training.freeze=["*embeddings*", "a=b"]', ("training", "freeze"), ["*embeddings*", "a=b"]),
        ("training.learning-rate=1e-3", ("training", "learning-rate"), 1e-3),
        ("training.seed=0x10", ("training", "seed"), 16),
        ("model.pair=true", ("model", "pair"), True),
        ('merge.gram={"*" = "block:4"}', ("merge", "gram"), {"*": "block:4"}),
        ("merge.gram.*=diagonal", ("merge", "gram", "*"), "diagonal"),
    ],
)
def test_a_setting_changes_its_key_and_nothing_else(setting: str, path: tuple[str, ...], value: Any) -> None:
    plan = Plan.parse(SMALL)
    expected = plan.document()
    table = expected
    for key in path[:-1]:
        table = table[key]
    table[path[-1]] = value
    assert plan.override([setting]).document() == expected


def test_settings_are_applied_in_order_and_together() -> None:
    plan = Plan.parse(SMALL).override(
        ["merge.alpha=0.1", 'model.labels=["x"]', 'model.labels=["x", "y"]', "merge.alpha=0"]
    )
    assert plan.merge.alpha == 0
    assert plan.model.labels == ("x", "y")


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("merge.alpha", "expected section.key=value"),
        ("alpha=1", "expected section.key=value"),
        (
            "merge.nope=1",
            "unknown key 'merge.nope'; known here: method, alpha, weighting, gram, exclude, context-free, experts, "
            "tokens, rounds, maximum-change, layout",
        ),
        ("nope.alpha=1", "unknown key 'nope'; known here: plan, model, task, training, merge, privacy, silo"),
        ("training.learning_rate=1.0", "unknown key 'training.learning_rate'; known here: epochs, learning-rate"),
        ("merge.alpha.deep=1", "'merge.alpha' is not a table"),
        ("silo.0.name=x", "is not a table"),
        ("merge.alpha=high", "'merge.alpha'"),
        ("merge.alpha=", "'merge.alpha'"),
        ("merge.alpha=2", "'merge.alpha'"),
        ("training.freeze=[", "'training.freeze'"),
        ("privacy.secure-aggregation=true", "secure aggregation of 2 silos hides nothing"),
        ("privacy.minimum-survivors=3", "'privacy.minimum-survivors' is more than the 2 silos of the roster"),
    ],
)
def test_a_setting_that_does_not_fit_is_refused_and_quoted(setting: str, message: str) -> None:
    plan = Plan.parse(SMALL)
    with pytest.raises(PlanError) as caught:
        plan.override([setting])
    assert str(caught.value).startswith(f"--set {setting}: ")
    assert message in str(caught.value)


def test_settings_remove_the_lock_and_no_settings_keep_it() -> None:
    locked = Plan.parse(SMALL).pinned(PINS, "2" * 64)
    assert locked.locked
    assert (locked.pins, locked.merge.layout) == (PINS, "2" * 64)
    assert locked.override([]) == locked
    changed = locked.override(["training.epochs=7"])
    assert not changed.locked
    assert (changed.pins, changed.merge.layout) == (Pins(None, None, None), None)
    assert changed == Plan.parse(SMALL).override(["training.epochs=7"])


def test_a_commit_stays_with_its_base_model() -> None:
    locked = Plan.parse(SMALL).pinned(PINS._replace(revision="a" * 40), "2" * 64)
    assert locked.unlocked().pins == locked.override(["merge.tokens=7"]).pins == Pins(None, None, None, "a" * 40)
    assert locked.override(['model.base="other"']).model.revision is None
    assert locked.override([f'model.revision="{"b" * 40}"', 'model.base="other"']).model.revision == "b" * 40


@pytest.mark.parametrize("missing", [*PINS._fields[:3], "layout"])
def test_a_lock_with_a_part_missing_is_no_lock(missing: str) -> None:
    pins = PINS._replace(**({} if missing == "layout" else {missing: None}))
    assert not Plan.parse(SMALL).pinned(pins, None if missing == "layout" else "2" * 64).locked


# Digest


def test_the_digest_of_the_small_plan_is_the_golden_vector() -> None:
    plan = Plan.parse(SMALL)
    assert canonical_json(plan.document()).decode() == SMALL_CANONICAL
    assert plan.digest == hashlib.sha256(SMALL_CANONICAL.encode()).hexdigest() == SMALL_DIGEST


@pytest.mark.parametrize("text", [SMALL, EVERY_KEY], ids=["defaults", "every key"])
def test_an_independent_canonicaliser_gets_the_same_digest(text: str) -> None:
    plan = Plan.parse(text)
    assert plan.digest == hashlib.sha256(_canonical(plan.document()).encode()).hexdigest()


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
    ("merge", "method"): "other",
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
    assert set(CHANGED) == set(_leaves(plan.document())), "a key of the plan has no change here"
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


# Canonical form


def test_keys_are_sorted_by_utf16_code_units() -> None:
    # RFC 8785, section 3.2.3: U+1F602 comes before U+FB33, because its first unit is D83D.
    document = {
        "\u20ac": "Euro Sign",
        "\r": "Carriage Return",
        "\ufb33": "Hebrew Letter Dalet With Dagesh",
        "1": "One",
        "\U0001f602": "Smiley",
        "\u0080": "Control",
        "\u00f6": "Latin Small Letter O With Diaeresis",
    }
    assert canonical_json(document).decode() == (
        '{"\\r":"Carriage Return","1":"One","\u0080":"Control","\u00f6":"Latin Small Letter O With Diaeresis",'
        '"\u20ac":"Euro Sign","\U0001f602":"Smiley","\ufb33":"Hebrew Letter Dalet With Dagesh"}'
    )


def test_strings_are_escaped_as_rfc_8785_says_and_no_more() -> None:
    # RFC 8785, section 3.2.2.2, and the characters that other JSON writers like to escape.
    text = "\u20ac$\u000f\u000aA'\u0042\u0022\u005c\\\"/\b\t\f\r\x00\x1f\x7f\u2028<&\ufeff"
    expected = '"\u20ac$\\u000f\\nA\'B\\"\\\\\\\\\\"/\\b\\t\\f\\r\\u0000\\u001f\x7f\u2028<&\ufeff"'
    assert canonical_json(text) == expected.encode("utf-8")


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.9, "0.9"),
        (0.1 + 0.2, "0.30000000000000004"),
        (5e-5, "5e-05"),
        (0.0001, "0.0001"),
        (1.0, "1.0"),
        (0.0, "0.0"),
        (5e-324, "5e-324"),
        (1.7976931348623157e308, "1.7976931348623157e+308"),
        (9007199254740993.0, "9007199254740992.0"),
        (1e16, "1e+16"),
        (np.float64(0.9), "0.9"),
    ],
)
def test_a_float_is_a_string_of_its_shortest_decimal(value: float, text: str) -> None:
    assert canonical_json([value]) == f'["{text}"]'.encode()


def test_integers_up_to_2_to_the_53_are_written_and_larger_ones_refused() -> None:
    limit = 2**53 - 1
    assert canonical_json([limit, -limit, 0]) == b"[9007199254740991,-9007199254740991,0]"
    for value in (limit + 1, -limit - 1, 10**40):
        with pytest.raises(ValueError, match="no canonical form"):
            canonical_json({"deep": [value]})


class _Colour(enum.Enum):
    RED = 1


@pytest.mark.parametrize(
    "value",
    [
        math.nan,
        math.inf,
        -math.inf,
        {1: "a"},
        {None: 1},
        {"a"},
        b"bytes",
        1j,
        _Colour.RED,
        "\ud800",
        {"\udc00": 1},
    ],
    ids=repr,
)
def test_what_has_no_canonical_form_is_a_value_error(value: Any) -> None:
    with pytest.raises(ValueError, match=r"."):
        canonical_json([value])


def test_literals_and_nesting() -> None:
    document = {"b": [None, True, False, {}, []], "a": (1, "x")}
    assert canonical_json(document) == b'{"a":[1,"x"],"b":[null,true,false,{},[]]}'
    assert digest(document) == hashlib.sha256(b'{"a":[1,"x"],"b":[null,true,false,{},[]]}').hexdigest()


_TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
_FLOATS = st.floats(allow_nan=False, allow_infinity=False)
_SCALARS = st.none() | st.booleans() | _TEXT | st.integers(1 - 2**53, 2**53 - 1) | _FLOATS
_DOCUMENTS = st.recursive(
    _SCALARS, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(_TEXT, inner, max_size=4)
)


@given(_DOCUMENTS)
def test_any_document_has_the_form_that_an_independent_canonicaliser_gives(document: Any) -> None:
    assert canonical_json(document).decode("utf-8") == _canonical(document)


@pytest.mark.parametrize("key", ["01" + "00" * 31, "01" + "00" * 30 + "80"])
def test_a_key_that_anybody_can_sign_with_is_no_silos_key(key: str) -> None:
    anybodys = bytes([1, *bytes(63)])  # the neutral point, and zero
    for statement in (b"one", b"another"):
        Ed25519PublicKey.from_public_bytes(bytes.fromhex(key[:62] + "00")).verify(anybodys, statement)
    with pytest.raises(PlanError, match=r"silo.0.public-key"):
        Plan.parse(SMALL.replace("[[silo]]", f'[[silo]]\npublic-key = "{key}"', 1))
