"""Plans as they are read and written, and what of them is refused."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from gramfuse_protocol.contract.plan import Plan
from gramfuse_protocol.errors import PlanError
from tests.protocol.plan.plans import EVERY_KEY, SMALL, TASKS, edit

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
    # A model that answers has no head; a plan without adapters has no table for them.
    assert written == known - {".task.first-token", ".training.lora"}


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
            "base, revision, sha256, config, processor, adapters, task, head, labels, pair, max-length, "
            "target-length, first-token, threshold, centre, scale, range",
        ),
        (
            "[training]\nshape = 1",
            "training.shape",
            "epochs, learning-rate, batch-size, warmup, weight-decay, precision, seed, freeze, lora",
        ),
        (
            "[merge]\nbeta = 1",
            "merge.beta",
            "method, refit, alpha, weighting, gram, exclude, context-free, experts, tokens, rounds, maximum-change, "
            "layout",
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


def test_a_misspelt_key_is_refused_with_the_one_that_was_meant() -> None:
    with pytest.raises(PlanError, match=r"unknown key 'merge\.alhpa'; did you mean 'alpha'\?$"):
        Plan.parse(SMALL + "\n[merge]\nalhpa = 1.0\n")


def test_a_silo_file_in_place_of_a_plan_is_called_one() -> None:
    with pytest.raises(PlanError, match="silo file"):
        Plan.parse('name = "north"\napproved = []\n[data]\ntrain = "train.jsonl"\n[limits]\n')


@pytest.mark.parametrize("key", ["secure_aggregation", "Secure-Aggregation"])
def test_a_key_in_another_spelling_is_an_unknown_key(key: str) -> None:
    with pytest.raises(PlanError, match=f"unknown key 'privacy.{key}'"):
        Plan.parse(edit(SMALL, "secure-aggregation", key))


def test_an_unknown_key_in_the_only_silo_is_the_only_complaint() -> None:
    text = edit(SMALL, '[[silo]]\nname = "b"\n', "") + "colour = 1\n"
    with pytest.raises(PlanError) as caught:
        Plan.parse(text, "plan.toml")
    (said,) = str(caught.value).splitlines()
    assert said.startswith("plan.toml: unknown key 'silo.0.colour'")
    assert said.endswith("name, public-key, node-key, task, labels")


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
        Plan.parse(edit(SMALL, old, new), "dir/plan.toml")
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
    text = edit(SMALL, section, line) if section in SMALL else f"{line}\n{SMALL}"
    with pytest.raises(PlanError, match=rf"plan.toml: .*{key}"):
        Plan.parse(text, "plan.toml")


def test_every_problem_of_a_file_is_listed() -> None:
    text = edit(edit(SMALL, 'name = "small"', "name = 1"), "aggregation = false", "aggregation = 0\nmetrics = 2")
    with pytest.raises(PlanError) as caught:
        Plan.parse(text, "plan.toml")
    lines = str(caught.value).splitlines()
    assert [line.split("'")[1] for line in lines] == ["plan.name", "privacy.secure-aggregation", "privacy.metrics"]
    assert all(line.startswith("plan.toml: ") for line in lines)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('labels = ["no", "yes"]', 'labels = ["no", "yes", "no"]', "'model': .*twice"),
        ('labels = ["no", "yes"]', 'labels = ["no"]', "two labels"),
        ('task = "classification"', 'task = "regression"', "task 'regression' has no labels"),
        ('task = "classification"', 'task = "classification"\ncentre = 1', "'centre'"),
        ('task = "classification"', 'task = "classification"\nfirst-token = "de"', "generates no texts"),
        ('name = "b"', 'name = "a"', r"\[\[silo\]\] names a "),
        ("secure-aggregation = false", "secure-aggregation = true", "secure aggregation of 2 silos hides nothing"),
        ("secure-aggregation = false", "", "secure aggregation of 2 silos hides nothing"),
    ],
    ids=lambda text: None,
)
def test_what_contradicts_itself_is_refused(old: str, new: str, message: str) -> None:
    with pytest.raises(PlanError, match=f"^plan.toml: .*{message}"):
        Plan.parse(edit(SMALL, old, new), "plan.toml")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('head = "own"', 'head = "same"', "silos share a body and keep their heads: 'model.head' must be \"own\""),
        ('head = "own"', 'head = "own"\ntask = "regression"', r"'task' belongs in each \[\[task\]\]"),
        ('task = "mail"', 'task = "post"', "'b' .*mail, names"),
        ('task = "mail"', 'task = "names"', "no \\[\\[silo\\]\\] has task mail"),
        ('name = "names"', 'name = "mail"', r"two \[\[task\]\] .*same name"),
        ('metrics = "silo"', 'metrics = "sum"', "different tasks .*'privacy.metrics'"),
        ('task = "token-classification"\nlabels = ["O", "B-X", "I-X"]', 'task = "causal-lm"', "no head"),
        ('labels = ["O", "B-X", "I-X"]', 'labels = ["O", "B-X"]', "IOB2"),
        ('labels = ["O", "B-X", "I-X"]', 'labels = ["O", "X", "B-X", "I-X"]', "IOB2.*'X'"),
        ('task = "mail"', 'task = "mail"\nlabels = ["no"]', "'labels' of a .*requires 'model.task'"),
    ],
)
def test_tasks_that_do_not_fit_together_are_refused(old: str, new: str, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        Plan.parse(edit(TASKS, old, new))


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
    return edit(SMALL.partition("[[silo]]")[0], "secure-aggregation = false", "\n".join(lines)) + roster


def test_a_label_that_few_silos_annotate_would_be_a_sum_over_few() -> None:
    plan = Plan.parse(masked("a", secure_aggregation="false"))
    assert plan.holders("yes") == ("a",)
    assert plan.task_of("a").annotated == (0, 1)
    assert plan.task_of("b").annotated == (0,)
    # One may drop out and one collude: of three that are left, two must be honest.
    for held in ("ab", "abc"):
        with pytest.raises(PlanError, match=f"label 'yes': {len(held)}.*at least 4"):
            Plan.parse(masked(held))
    assert Plan.parse(masked("abcd")).holders("yes") == ("a", "b", "c", "d")
    assert len(Plan.parse(masked("abc", minimum_survivors=4, colluding=1)).holders("yes")) == 3
    with pytest.raises(PlanError, match="label 'yes': 0"):
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


# Canonical form


@pytest.mark.parametrize("key", ["01" + "00" * 31, "01" + "00" * 30 + "80"])
def test_a_key_that_anybody_can_sign_with_is_no_silos_key(key: str) -> None:
    anybodys = bytes([1, *bytes(63)])  # the neutral point, and zero
    for statement in (b"one", b"another"):
        Ed25519PublicKey.from_public_bytes(bytes.fromhex(key[:62] + "00")).verify(anybodys, statement)
    with pytest.raises(PlanError, match=r"silo.0.public-key"):
        Plan.parse(SMALL.replace("[[silo]]", f'[[silo]]\npublic-key = "{key}"', 1))
