"""The silo file, the plan and the data: each thing that is wrong is named with what to do."""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from tokenizers.normalizers import BertNormalizer

from gramfuse_client.data.examples import Examples, load
from gramfuse_client.dry_run import of_inputs
from gramfuse_client.dry_run.findings import Findings
from gramfuse_client.guard import policy
from gramfuse_client.silo_file import Data, Silo, SiloFile, write_identity
from gramfuse_client.state.state import Contributed, State
from gramfuse_model.loading.base_model import load_base
from gramfuse_protocol.contract import node_key
from gramfuse_protocol.contract.plan import Plan
from gramfuse_protocol.errors import RefusalError
from gramfuse_protocol.secure_sum.keys import Identity
from gramfuse_protocol.tasks.registry import kind_of
from tests.client.dry_run.sites import NAME, Coordinator, Site, finding, problems

# The silo file, the plan, the data


def test_a_silo_file_that_cannot_be_read_is_all_that_is_said(site: Site) -> None:
    site.edit("[limits]", "[limit]")
    report = site.check()
    assert problems(report).keys() == {"silo file"}
    assert "unknown key 'limit'" in problems(report)["silo file"]
    assert report.disclosure is None


def _not_approved(site: Site) -> None:
    site.edit(site.plan.digest, "1" * 64)


def _not_in_the_roster(site: Site) -> None:
    site.edit(f'name = "{NAME}"', 'name = "silo-x"')


def _another_without_a_key(site: Site) -> None:
    site.project.replace(site.project.plan, f'public-key = "{site.plan.silo[1].public_key}"\n', "")
    site.lock()


def _less_metrics(site: Site) -> None:
    site.edit('metrics = "sum"', 'metrics = "none"')


def _words_told(site: Site) -> None:
    site.project.replace(site.project.plan, "[merge]", '[merge]\ncontext-free = "full"')
    site.lock()


def _fewer_bytes(site: Site) -> None:
    site.edit("[limits]", "[limits]\nmaximum-bytes = 1000")


def _more_examples(site: Site) -> None:
    site.edit("minimum-examples = 10", "minimum-examples = 100")


def _contributed(site: Site) -> None:
    train, _ = load(Silo.read(site.silo), site.plan.task_of(NAME))
    state = State(Silo.read(site.silo).state, site.plan.digest)
    Silo.read(site.silo).state.mkdir(mode=0o700)
    state.directory.mkdir(mode=0o700)
    state.contribute(Contributed(sessions={1: ("a" * 32,)}, data=train.digest))


def _other_data_contributed(site: Site) -> None:
    _contributed(site)
    site.edit("[limits]", "[limits]\nrepeat-contributions = true")
    with site.project.train(NAME).open("a") as file:
        file.write('{"text": "a new cat", "label": "animals"}\n')


def _damaged_contributed(site: Site) -> None:
    _contributed(site)
    (Silo.read(site.silo).state / site.plan.digest / "contributed.json").write_text("{")


def _unknown_label(site: Site) -> None:
    with site.project.train(NAME).open("a") as file:
        file.write('{"text": "a cat", "label": "cats"}\n')


def _no_data(site: Site) -> None:
    site.project.train(NAME).unlink()


def _open_key(site: Site) -> None:
    site.project.identity(NAME).chmod(0o644)


def _no_identity(site: Site) -> None:
    site.project.identity(NAME).unlink()


def _other_identity(site: Site) -> None:
    site.project.identity(NAME).unlink()
    write_identity(site.project.identity(NAME), Identity(bytes(32)))


def _no_node_key(site: Site) -> None:
    Silo.read(site.silo).node_key_path.unlink()


def _other_node_key(site: Site) -> None:
    Silo.read(site.silo).node_key_path.write_text(node_key.generate()[0])


def _node_key_not_in_the_plan(site: Site) -> None:
    line = Silo.read(site.silo).node_key()
    site.project.replace(site.project.plan, f'node-key = "{line}"\n', "")
    site.lock()


def _other_base(site: Site) -> None:
    site.project.replace(site.project.plan, site.plan.model.sha256 or "", "2" * 64)
    site.edit(site.plan.digest, Plan.read(site.project.plan).digest)


def _no_base(site: Site) -> None:
    site.edit("[data]", 'base = "nowhere/at/all"\n[data]')


def _base_on_the_hub(site: Site) -> None:
    site.edit("[data]", 'base = "gramfuse/no-such-model"\n[data]')


def _other_layout(site: Site) -> None:
    site.project.replace(site.project.plan, site.plan.merge.layout or "", "3" * 64)
    site.edit(site.plan.digest, Plan.read(site.project.plan).digest)


def _not_locked(site: Site) -> None:
    site.project.replace(site.project.plan, f'layout = "{site.plan.merge.layout}"', "")
    site.edit(site.plan.digest, Plan.read(site.project.plan).digest)


def _no_gpu(site: Site) -> None:
    site.edit('device = "cpu"', 'device = "mps"')


def _wide_state(site: Site) -> None:
    Silo.read(site.silo).state.mkdir(mode=0o755)


def _no_coordinator(site: Site) -> None:
    Silo.read(site.silo).node_key_path.rename(site.silo.with_suffix(".key"))
    site.silo.write_text(site.silo.read_text().partition("[coordinator]")[0])


def _no_authority(site: Site) -> None:
    Silo.read(site.silo).ca_path.unlink()


def _no_certificate(site: Site) -> None:
    Silo.read(site.silo).ca_path.write_text("-----BEGIN NONSENSE-----")


@pytest.mark.parametrize(
    ("change", "subject", "words"),
    [
        (_not_approved, "approval", ['approved = ["' + "1" * 64 + '", "{digest}"]', "gramfuse plan show {project}"]),
        (_not_in_the_roster, "roster", ["'silo-x'", "silo-a, silo-b", "correct 'name'"]),
        (_another_without_a_key, "roster", ["silo-b", "gramfuse silo keygen"]),
        (_less_metrics, "metrics", ["'none'", 'metrics = "sum"', "[limits]"]),
        (_words_told, "vocabulary", ["merge.context-free = 'full'", 'context-free = "full"', "[limits]"]),
        (_fewer_bytes, "size", ["maximum-bytes", "71,408", "block:128"]),
        (_more_examples, "data", ["24 training examples", "'limits.minimum-examples' = 100"]),
        (_contributed, "repeat", ["contributed", "same silos", "--resume"]),
        (_other_data_contributed, "data", ["other data", "same silos"]),
        (_damaged_contributed, "repeat", ["contributed.json", "damaged", "gramfuse silo ledger show"]),
        (_unknown_label, "data", ["train.jsonl:25", "unknown label 'cats'"]),
        (_no_data, "data", ["no such file", "[data]"]),
        (_open_key, "identity", ["chmod 600"]),
        (_no_identity, "identity", ["gramfuse silo keygen"]),
        (_other_identity, "identity", ["roster has", 'public-key = "3b6a27bc']),
        (_no_node_key, "node key", ["gramfuse silo keygen"]),
        (_other_node_key, "node key", ["roster has another key", 'node-key = "ecdsa']),
        (_node_key_not_in_the_plan, "node key", ["roster has no key", 'node-key = "ecdsa']),
        (_other_base, "base model", ["locked to " + "2" * 64, 'base = "DIRECTORY"']),
        (_no_base, "base model", ["nowhere/at/all", 'base = "DIRECTORY"']),
        (_base_on_the_hub, "base model", ["not on this machine", "hf download gramfuse/no-such-model"]),
        (_other_layout, "layout", ["locked to " + "3" * 64, "same versions"]),
        (_not_locked, "lock", ["not locked", "gramfuse plan lock"]),
        (_no_gpu, "device", ["torch finds no", 'device = "auto"']),
        (_wide_state, "state", ["mode 755", "chmod 700"]),
        (_no_coordinator, "coordinator", ["[coordinator]", "address"]),
        (_no_authority, "authority", ["No such file", "ca.crt"]),
        (_no_certificate, "authority", ["no PEM certificate", "ca.crt"]),
    ],
)
def test_what_is_wrong_is_named_with_what_to_do(
    site: Site, change: Callable[[Site], None], subject: str, words: list[str]
) -> None:
    change(site)
    found = problems(site.check(offline=True))
    assert found.keys() == {subject}, found
    for word in words:
        assert word.format(digest=Plan.read(site.project.plan).digest, project=site.project.directory) in found[subject]


def test_bad_rows_are_counted_and_left_out_as_the_silo_file_allows(site: Site, gramfuse: Callable[..., Any]) -> None:
    with site.project.train(NAME).open("a") as file:
        file.write('{"text": "a cat", "label": "cats"}\n{"text": "a cat", "label": null}\n')
    arguments = ("silo", "check", site.silo, "--plan", site.project.directory, "--offline", "--json")
    assert "2 of 26 rows cannot be used" in problems(site.check(offline=True))["data"]
    code, out, _ = gramfuse(*arguments, "--skip-bad", "5")
    found = [finding for finding in json.loads(out)["findings"] if finding["state"] == "problem"]
    assert code == 19, "a run would fail"
    assert [finding["subject"] for finding in found] == ["bad rows"]
    assert "train.jsonl:25: unknown label 'cats'" in found[0]["what"]
    assert "train.jsonl:26: a label" in found[0]["what"]
    site.edit("[data]", f"[data]\n{found[0]['remedy'].splitlines()[-1]}")
    report = site.check(offline=True)
    assert not problems(report)
    assert "2 bad rows" in finding(report, "bad rows").what
    assert "24 training examples" in finding(report, "data").what


def test_open_uploads_are_named(make_site: Callable[..., Site], coordinator: Coordinator) -> None:
    site = make_site(coordinator, secure=False)
    write_identity(site.project.identity(NAME), Identity(bytes(32)))
    site.edit("open-uploads = true", "open-uploads = false")
    found = problems(site.check(offline=True))
    assert found.keys() == {"uploads"}
    assert "open-uploads = true" in found["uploads"]


def test_what_only_the_policy_knows_is_named_too(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(policy, "refusals", lambda *_: [("fee", RefusalError("a rule that came later; do this"))])
    assert problems(site.check(offline=True)) == {"fee": "a rule that came later\ndo this"}


def test_all_problems_are_named_and_as_json_in_one_object(
    site: Site, coordinator: Coordinator, gramfuse: Callable[..., Any]
) -> None:
    for change in (_not_approved, _less_metrics, _open_key, _more_examples, _fewer_bytes):
        change(site)
    coordinator.statuses["/v1/control/start-run"] = 405
    arguments = ("silo", "check", site.silo, "--plan", site.project.directory)
    code, out, err = gramfuse(*arguments)
    assert code == 19
    assert out.count("PROBLEM") == 6
    assert "6 problems: approval, metrics, identity, data, size, control API" in err
    assert f"What {NAME} would send" in out
    code, out, err = gramfuse(*arguments, "--json")
    document = json.loads(out)
    assert code == 19
    assert not document["ready"]
    assert document["error"]["type"] == "CheckError"
    assert document["error"]["exit_code"] == 19
    assert [f["subject"] for f in document["findings"] if f["state"] == "problem"] == [
        "approval", "metrics", "identity", "data", "size", "control API"
    ]  # fmt: skip
    assert "6 problems" in err


def test_outside_of_its_hours_a_silo_is_ready_and_says_when(site: Site) -> None:
    site.edit("[limits]", '[limits]\ntrain-hours = "20:00-06:00"')
    noon = datetime(2027, 1, 1, 12, tzinfo=UTC)
    hours = finding(site.check(offline=True, now=noon), "hours")
    assert hours.state == "ok"
    assert "12:00" in hours.what
    assert "20:00-06:00" in hours.what
    assert "refuse" in hours.remedy
    assert not finding(site.check(offline=True, now=noon.replace(hour=21)), "hours").remedy


# The coordinator


MASKED = 'task = "multi-label"\nlabels = ["a", "b", "c"]'

KINDS_OF_DATA = {
    "multi-label": (
        MASKED,
        [["a"], ["a", "b"], []],
        "'a' 2, 'b' 1; no label 1; ",
        "each label",
    ),
    "token-classification": (
        'task = "token-classification"\nlabels = ["O", "B-PER", "I-PER", "B-LOC", "I-LOC"]',
        ["B-PER I-PER", "O B-PER", "B-LOC B-LOC"],
        "'PER' 2, 'LOC' 2",
        "each entity type",
    ),
    "sequence-to-sequence": ('task = "sequence-to-sequence"', ["x", "y", "z"], "targets are texts", "exact matches"),
    "prompt-completion": ('task = "prompt-completion"', ["x", "y", "z"], "completions are texts", "exact matches"),
    "causal-lm": ('task = "causal-lm"', ["", "", ""], "21 characters", "correctly predicted tokens"),
}


@pytest.mark.parametrize("kind", KINDS_OF_DATA)
def test_each_kind_of_data_is_counted_in_its_own_words(kind: str, tmp_path: Path) -> None:
    task, labels, counted, leaving = KINDS_OF_DATA[kind]
    rows = [{"text": "one two", "label": label} for label in labels]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "silo.toml").write_text(
        'name = "silo-a"\n[data]\ntrain = "rows.jsonl"\nheld-out = "rows.jsonl"\n[limits]\nminimum-examples = 1\n'
    )
    own = 'labels = ["b", "a"]' if task is MASKED else ""
    plan = Plan.parse(
        f'[plan]\nname = "x"\n[model]\nbase = "x"\n{task}\n[privacy]\nsecure-aggregation = false\n'
        f'[[silo]]\nname = "silo-a"\n{own}\n[[silo]]\nname = "silo-b"\n'
    )
    found = Findings()
    of_inputs.check_data(found, Silo.read(tmp_path / "silo.toml"), plan, None, offline=True)
    (data,) = list(found)
    assert data.state == "ok"
    assert f"3 training examples ({counted}" in data.what
    assert "3 held out" in data.what
    assert leaving in kind_of(plan.task_of("silo-a")).summed


@pytest.mark.parametrize(
    ("texts", "state", "words"),
    [
        (["cat dog", "cat dog hen cow", "cat"], "ok", "1 of 9 words have no token: they come after the 5 tokens"),
        (["cat dog", "\u200b", "hen cow"], "problem", "1 of 3 examples have no word"),
    ],
)
def test_words_that_the_model_does_not_see_are_told_before_a_run(
    texts: list[str], state: str, words: str, pico_bert: Path, tmp_path: Path
) -> None:
    plan = Plan.parse(
        f'[plan]\nname = "x"\n[model]\nbase = "{pico_bert}"\nmax-length = 5\ntask = "token-classification"\n'
        'labels = ["O", "B-X", "I-X"]\n[privacy]\nsecure-aggregation = false\n[[silo]]\nname = "silo-a"\n'
    )
    base = load_base(plan, tmp_path)
    base.tokenizer.backend_tokenizer.normalizer = BertNormalizer()
    split = [tuple(text.split(" ")) for text in texts]
    examples = Examples(split, None, [(0,) * len(each) for each in split])
    silo = Silo(tmp_path / "silo.toml", SiloFile(name="silo-a", data=Data(train="x", held_out=0.5)))
    found = Findings()
    of_inputs.check_encoding(found, silo, plan, base, (examples, examples.take([0])))
    (tokens,) = found
    assert tokens.state == state
    assert words in tokens.what
