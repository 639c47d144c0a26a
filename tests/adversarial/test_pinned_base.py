"""A coordinator that hands out base files, so that all silos but one learn nothing and the sum is that one alone.

The weights it hands out are those of the plan. What it changes is how they are used: a configuration in which nothing
gets through, a tokenizer to which all words are one. It gets a refusal before any data are read, and knows no more than
that this silo's files are not the plan's.
"""

from __future__ import annotations

import json
import secrets
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from gramfuse_client.dry_run.findings import Findings
from gramfuse_client.dry_run.of_inputs import check_base
from gramfuse_client.exchange.participant import Participant
from gramfuse_client.silo_file import Silo
from gramfuse_model.loading.base_model import load_base
from gramfuse_model.project import Project
from gramfuse_protocol.contract.plan import Plan
from gramfuse_protocol.errors import ModelError, PlanError
from gramfuse_protocol.messages.phases import JoinReply, JoinRequest, Message, Refusal

WORDS = "cat|dog|horse|sheep|goat|duck|hen|cow|rain|snow|wind|sun|storm|cloud|frost|hail|pan|pot|knife|spoon|oven|plate"


def edit(path: Path, **changes: Any) -> None:
    document = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    path.write_text(json.dumps(document | changes), encoding="utf-8")


class Run:
    """A locked plan, and what its silos answer and find, each with its own copy of the base model."""

    def __init__(self, project: Any, *settings: str) -> None:
        read = Project.read(project.directory, settings)
        self.directory = read.directory
        self.plan, self.layout = read.locked()
        self.path = project.silo("silo-b")
        project.replace(self.path, "approved = []", f'approved = ["{self.plan.digest}"]')

    def silo(self, base: Path | None) -> Silo:
        silo = Silo.read(self.path)
        return Silo(silo.path, silo.file.model_copy(update={"base": None if base is None else str(base)}))

    def join(self, base: Path | None) -> Message:
        about = {"plan": self.plan.digest, "session": secrets.token_hex(16)}
        request = JoinRequest(**about, plan_text=self.plan.to_toml(), layout=self.layout.to_json())
        return Participant(self.silo(base)).answer(request)

    def found(self, base: Path | None) -> list[str]:
        """What `gramfuse silo check` finds wrong with the base model."""
        found = Findings()
        check_base(found, self.silo(base), self.plan)
        return [finding.subject for finding in found.problems]

    def refuses(self, base: Path) -> bool:
        """Whether a silo takes no part with these files, for no reason but that they are not the plan's."""
        reply = self.join(base)
        assert not isinstance(reply, JoinReply), "the silo joined"
        assert isinstance(reply, Refusal)
        assert (reply.error, reply.reason) == (ModelError.__name__, ModelError.summary)
        assert not any(Path(self.silo(base).state).rglob("*.safetensors"))
        return self.found(base) == ["base model"]


@pytest.fixture
def run(pico_project: Callable[..., Any]) -> Run:
    return Run(pico_project(silos=4, secure=True))


def dropout(copy: Path) -> None:
    """All that goes through a layer in training is zero, so nothing is learned."""
    edit(copy / "config.json", hidden_dropout_prob=1.0, classifier_dropout=1.0)


def normalizer(copy: Path) -> None:
    """All words that mean something are one, so there is nothing to learn."""
    words = {"type": "Replace", "pattern": {"Regex": WORDS}, "content": "the"}
    edit(copy / "tokenizer.json", normalizer=words)


def norm(copy: Path) -> None:
    """Each layer's output is divided by a thousand, so hardly a gradient gets through."""
    edit(copy / "config.json", layer_norm_eps=1e6)


def added_token(copy: Path) -> None:
    """A text is one token, which the vocabulary had already, up to its last word."""
    tokens = json.loads((copy / "tokenizer.json").read_text(encoding="utf-8"))["added_tokens"]
    swallow = {"single_word": False, "lstrip": True, "rstrip": True, "normalized": False, "special": False}
    edit(copy / "tokenizer.json", added_tokens=[*tokens, {"id": 39, "content": "e", **swallow}])


def post_processor(copy: Path) -> None:
    """A text is not in its tokens, only what stands around it."""
    special = {"[CLS]": {"id": "[CLS]", "ids": [2], "tokens": ["[CLS]"]}}
    alone = [{"SpecialToken": {"id": "[CLS]", "type_id": 0}}]
    pair = [*alone, {"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}]
    single = [*alone, {"Sequence": {"id": "A", "type_id": 1}}]  # of a type that the model knows nothing of
    template = {"type": "TemplateProcessing", "single": single, "pair": pair, "special_tokens": special}
    edit(copy / "tokenizer.json", post_processor=template)


def padding(copy: Path) -> None:
    """Padding is a word, and that word is not seen."""
    edit(copy / "tokenizer_config.json", pad_token="cat")


def activation(copy: Path) -> None:
    """Layers that were trained with one function compute another."""
    edit(copy / "config.json", hidden_act="relu")


@pytest.mark.parametrize(
    "change", [dropout, normalizer, norm, added_token, post_processor, padding, activation], ids=lambda c: c.__name__
)
def test_a_silo_whose_files_would_teach_it_nothing_does_not_join(
    run: Run, tmp_path: Path, pico_bert: Path, change: Callable[[Path], None]
) -> None:
    copy = shutil.copytree(pico_bert, tmp_path / "copy")
    change(copy)
    assert run.refuses(copy)


def test_an_honest_copy_is_as_good_as_the_original(run: Run, tmp_path: Path, pico_bert: Path) -> None:
    assert isinstance(run.join(None), JoinReply)
    copy = tmp_path / "elsewhere" / "under another name"
    transformers.AutoModel.from_pretrained(pico_bert).save_pretrained(copy)
    tokenizer = transformers.AutoTokenizer.from_pretrained(pico_bert)
    tokenizer(["the cat", "a dog sat"], padding=True, truncation=True, max_length=3)  # which it remembers, and saves
    tokenizer.chat_template = "{{ nobody reads this }}"
    tokenizer.save_pretrained(copy)
    edit(copy / "config.json", transformers_version="4.57.0", _name_or_path="some/where", dtype="float16")
    edit(copy / "generation_config.json", repetition_penalty=9.0)  # a classifier generates nothing
    (copy / "modeling.py").write_text("raise SystemExit('nobody runs this')", encoding="utf-8")
    (copy / "pytorch_model.bin").write_bytes(b"nobody opens this")
    assert isinstance(run.join(copy), JoinReply)
    assert run.found(copy) == []


def test_no_plan_without_all_pins_is_joined(run: Run, tmp_path: Path) -> None:
    """The coordinator leaves out a digest, and has silos approve the rest."""
    for key in ("config", "processor"):
        text = run.plan.to_toml()
        run.plan = run.plan.pinned(run.plan.pins._replace(**{key: None}), run.plan.merge.layout)
        approved = run.path.read_text(encoding="utf-8")
        run.path.write_text(approved.replace("approved = [", f'approved = ["{run.plan.digest}", '), encoding="utf-8")
        reply = run.join(None)
        assert isinstance(reply, Refusal)
        assert (reply.error, "not locked" in reply.reason) == ("RefusalError", True)
        run.plan = Plan.parse(text)


def test_texts_for_which_the_base_has_no_places_are_refused_before_any_are_read(
    pico_project: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A plan that its author's gramfuse let pass would have silos with long texts fail, and so tell who has some."""
    project = pico_project(silos=4, secure=True)
    with monkeypatch.context() as lax:
        lax.setattr("gramfuse_model.probing.lengths.check_lengths", lambda *_, **__: None)
        lax.setattr("gramfuse_model.derive_layout.check_long_texts", lambda *_: None)
        run = Run(project, "model.max-length=64")
    for name in project.names:
        project.train(name).unlink()
    reply = run.join(None)
    assert isinstance(reply, Refusal)
    assert (reply.error, reply.reason) == ("PlanError", PlanError.summary)


def test_what_a_body_has_beside_the_shared_part_is_pinned_too(
    pico_project: Callable[..., Any], tmp_path: Path, pico_bert: Path
) -> None:
    """Silos keep what not all tasks have. Files in which that part is saturated let no gradient through to the rest."""
    project = pico_project(silos=2)
    text = project.plan.read_text(encoding="utf-8")
    first, _, rest = text.partition('task = "classification"\nhead = "same"\n')
    labels, _, rest = rest.partition("max-length = 16\n")
    tasks = f'head = "own"\n[[task]]\nname = "topics"\ntask = "classification"\n{labels}max-length = 16\n'
    tasks += '[[task]]\nname = "names"\ntask = "token-classification"\nlabels = ["O", "B-X", "I-X"]\nmax-length = 16\n'
    rest = rest.replace('name = "silo-a"', 'name = "silo-a"\ntask = "names"')
    rest = rest.replace('name = "silo-b"', 'name = "silo-b"\ntask = "topics"').replace('metrics = "sum"', "")
    project.plan.write_text(first + tasks + rest, encoding="utf-8")
    run = Run(project)
    assert isinstance(run.join(None), JoinReply)
    model = transformers.AutoModel.from_pretrained(pico_bert)
    with torch.no_grad():
        model.pooler.dense.bias.fill_(1e6)
    copy = shutil.copytree(pico_bert, tmp_path / "copy")
    model.save_pretrained(copy)
    assert run.refuses(copy)


FAMILIES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "pictures": (
        'task = "image-classification"\nlabels = ["a", "b"]',
        "preprocessor_config.json",
        {"image_mean": [9.0, 9.0, 9.0], "image_std": [1e6, 1e6, 1e6]},  # all pictures are one colour
    ),
    "answers": (
        'task = "sequence-to-sequence"',
        "generation_config.json",
        {"forced_bos_token_id": 7, "repetition_penalty": 1e6},  # all answers are one word
    ),
}


@pytest.mark.parametrize("kind", FAMILIES)
def test_pictures_and_answers_are_pinned_with_the_model(
    tmp_path: Path, pico_project: Callable[..., Any], pico_tokenizer: Any, kind: str
) -> None:
    task, file, change = FAMILIES[kind]
    base = tmp_path / "base"
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
    if kind == "pictures":
        transformers.ViTModel(transformers.ViTConfig(**sizes, image_size=8, patch_size=4)).save_pretrained(base)
        transformers.ViTImageProcessorPil(size={"height": 8, "width": 8}).save_pretrained(base)
    else:
        small = {"d_model": 8, "d_kv": 4, "d_ff": 8, "num_layers": 1, "num_heads": 2, "decoder_start_token_id": 0}
        config = transformers.T5Config(**small, vocab_size=len(pico_tokenizer), pad_token_id=0, eos_token_id=3)
        transformers.T5ForConditionalGeneration(config).save_pretrained(base)
        pico_tokenizer.save_pretrained(base)
    project = pico_project(silos=2, base=base)
    text = project.plan.read_text(encoding="utf-8")
    begin, end = text.index("task = "), text.index("[training]")
    rest = text[end:].replace("*embeddings*", "embeddings")
    project.plan.write_text(f"{text[:begin]}{task}\n\n{rest}", encoding="utf-8")
    run = Run(project)
    assert run.found(shutil.copytree(base, tmp_path / "honest")) == []
    copy = shutil.copytree(base, tmp_path / "copy")
    edit(copy / file, **change)
    assert run.found(copy) == ["base model"]
    with pytest.raises(ModelError):
        load_base(run.plan, run.directory, override=str(copy))


class Hub:
    """What this machine has of a model of the hub, offline: its commits, and which of them is the newest."""

    def __init__(self, cache: Path) -> None:
        self.place = cache / "models--someone--pico"

    def push(self, files: Path, commit: str) -> Path:
        (self.place / "refs").mkdir(parents=True, exist_ok=True)
        (self.place / "refs" / "main").write_text(commit, encoding="utf-8")
        return shutil.copytree(files, self.place / "snapshots" / commit)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    return Hub(tmp_path / "hub")


def test_a_hub_model_that_was_moved_stays_at_the_plans_commit(
    hub: Hub, pico_project: Callable[..., Any], pico_bert: Path
) -> None:
    first, second = "a1" * 20, "b2" * 20
    hub.push(pico_bert, first)
    run = Run(pico_project(silos=4, secure=True, base=Path("someone/pico")))
    assert run.plan.model.revision == first
    # The owner of the repository pushes; silos that download now, and the coordinator that locks again, get the same.
    dropout(hub.push(pico_bert, second))
    assert isinstance(run.join(None), JoinReply)
    assert run.found(None) == []
    assert Project(run.directory, run.plan.unlocked()).locked()[0] == run.plan
    # A plan that names the other commit, and one that names none, are joined by nobody.
    for revision in (second, None):
        run.plan = run.plan.pinned(run.plan.pins._replace(revision=revision), run.plan.merge.layout)
        with pytest.raises(ModelError):
            load_base(run.plan, run.directory)
        assert run.found(None) == ["base model"]
    # Who wants the newest says so.
    newest = Project.read(run.directory).locked()[0]
    assert newest.model.revision == second
    assert newest.pins[1] != run.plan.model.config
