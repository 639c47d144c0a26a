"""What is done with the files of a model as others leave them: measured and locked if they are sound, or refused.

Where something is refused, the error names what stands in the files and what to do.
"""

from __future__ import annotations

import errno
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from click.testing import CliRunner
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from gramfuse_cli.main import cli
from gramfuse_client.measuring.collect import collect_statistics
from gramfuse_model.derive_layout import derive_layout, plan_layout
from gramfuse_model.differences import add_differences
from gramfuse_model.loading.base_model import load_base, trainable
from gramfuse_model.loading.zero_head import load_zero_headed, plan_for
from gramfuse_protocol.contract.plan import Plan
from gramfuse_protocol.contract.task import Task
from gramfuse_protocol.errors import ContributionError, GramfuseError, ModelError, PlanError, RunDirectoryError
from gramfuse_protocol.statistics.file import read_statistics
from gramfuse_server.merging.regmean import merge

LABELS = ["animals", "weather", "kitchen"]
ROWS = [
    {"text": text, "label": label}
    for text, label in [
        ("the old cat and a dog", "animals"),
        ("my horse near the big goat", "animals"),
        ("rain and wind", "weather"),
        ("the snow of a storm", "weather"),
        ("a small pan", "kitchen"),
        ("your knife and my spoon", "kitchen"),
    ]
]
WEIGHTS = "model.safetensors"

Change = Callable[[Path], object]


def gramfuse(*arguments: Any) -> dict[str, Any]:
    """Run a command in this process and return its JSON; what it raises is raised here."""
    result = CliRunner().invoke(cli, [*map(str, arguments), "--json"])
    if isinstance(result.exception, GramfuseError):
        raise result.exception
    assert result.exit_code == 0, f"{result.output} {result.exception!r}"
    report: dict[str, Any] = json.loads(result.stdout)
    return report


def edit(path: Path, **changes: Any) -> None:
    document = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(document | changes), encoding="utf-8")


def rename(copy: Path, new: Callable[[str], str | None]) -> None:
    """Give the tensors of a model's files other names; None leaves one out."""
    tensors = {new(name): tensor for name, tensor in load_file(copy / WEIGHTS).items()}
    save_file({name: t for name, t in tensors.items() if name is not None}, copy / WEIGHTS, metadata={"format": "pt"})


class Models:
    """A base, a model that was fine-tuned from it, and what becomes of changed copies of them."""

    def __init__(self, base: Path, directory: Path) -> None:
        self.base = base
        self.directory = directory
        self.model = directory / "model"
        directory.mkdir(exist_ok=True)
        torch.manual_seed(3)
        tuned = transformers.AutoModelForSequenceClassification.from_pretrained(
            base, num_labels=3, id2label=dict(enumerate(LABELS)), label2id={label: n for n, label in enumerate(LABELS)}
        )
        with torch.no_grad():
            for parameter in tuned.parameters():
                parameter += 0.02 * torch.randn(parameter.shape)
        tuned.save_pretrained(self.model)
        transformers.AutoTokenizer.from_pretrained(base).save_pretrained(self.model)
        self.data = directory / "train.jsonl"
        self.data.write_text("".join(json.dumps(row) + "\n" for row in ROWS), encoding="utf-8")

    def copy(self, of: Path, change: Change = lambda copy: None) -> Path:
        copy = self.directory / f"copy-{len(list(self.directory.iterdir()))}"
        shutil.copytree(of, copy)
        change(copy)
        return copy

    def measure(self, model: Path | None = None, base: Path | None = None, *options: Any) -> dict[str, Any]:
        out = self.directory / f"{len(list(self.directory.iterdir()))}.safetensors"
        given = ("--base", base or self.base, "--data", self.data, "-o", out)
        return gramfuse("measure", model or self.model, *given, *options)

    def lock(self, base: Path, **settings: str) -> dict[str, Any]:
        return gramfuse("plan", "lock", self.project(base, **settings))

    def project(self, base: Path, **settings: str) -> Path:
        project = self.directory / f"project-{len(list(self.directory.iterdir()))}"
        project.mkdir()
        task = {"task": '"classification"', "labels": json.dumps(LABELS), "max-length": "16", **settings}
        lines = "".join(f"{key} = {value}\n" for key, value in task.items())
        (project / "plan.toml").write_text(
            f'[plan]\nname = "x"\n[model]\nbase = "{base}"\n{lines}'
            '[privacy]\nsecure-aggregation = false\nmetrics = "silo"\n[[silo]]\nname = "a"\n[[silo]]\nname = "b"\n'
        )
        return project


@pytest.fixture
def models(pico_bert: Path, tmp_path: Path) -> Models:
    return Models(pico_bert, tmp_path)


def refused(names: str, what: Callable[[], object], kind: type[GramfuseError] = ModelError) -> None:
    """Check that something is refused with an error that has all of these words."""
    with pytest.raises(kind) as caught:
        what()
    missing = [name for name in names.split() if name not in str(caught.value)]
    assert not missing, f"{missing} not in {caught.value}"


def config(**changes: Any) -> Change:
    return lambda copy: edit(copy / "config.json", **changes)


def keys(new: Callable[[str], str | None]) -> Change:
    return lambda copy: rename(copy, new)


def test_a_sound_model_is_measured_and_a_sound_base_is_locked(models: Models) -> None:
    assert models.measure()["examples"] == len(ROWS)
    assert models.lock(models.base)["base_sha256"]


@pytest.mark.parametrize(
    ("wrapper", "named"),
    [
        ("_orig_mod.", "_orig_mod. torch.compile"),
        ("module.", "module. DataParallel"),
        ("model.", "model. names"),
        ("base_model.model.", "base_model.model. merge_and_unload()"),
    ],
)
def test_weights_under_the_names_of_a_wrapper_are_not_taken_for_new_ones(
    models: Models, wrapper: str, named: str
) -> None:
    wrapped = keys(lambda name: wrapper + name)
    for files in (models.model, models.base):
        copy = models.copy(files, wrapped)
        refused(f"{named} {copy} bert.embeddings.LayerNorm.bias", lambda copy=copy: models.lock(copy))  # type: ignore[misc]
    copy = models.copy(models.model, wrapped)
    refused(f"{named} {copy}", lambda: models.measure(copy))


def test_weights_under_the_names_of_a_wrapped_layer_are_not_taken_for_new_ones(models: Models) -> None:
    compiled = models.copy(models.model, keys(lambda name: name.replace("layer.0.", "layer.0._orig_mod.")))
    refused("_orig_mod. torch.compile", lambda: models.measure(compiled))
    adapted = models.copy(models.model, keys(lambda name: name.replace("query.weight", "query.base_layer.weight")))
    refused("base_layer. merge_and_unload()", lambda: models.measure(adapted))


def without(part: str) -> Change:
    return keys(lambda name: None if part in name else name)


def test_what_the_files_of_a_fine_tuned_model_lack_is_not_made_up(models: Models) -> None:
    for part, name in (("layer.1.", "bert.encoder.layer.1."), ("classifier", "classifier.bias"), ("pooler", "pooler")):
        lacking = models.copy(models.model, without(part))
        refused(f"{lacking} {name} MODEL", lambda lacking=lacking: models.measure(lacking))  # type: ignore[misc]
    models.data.write_text("".join(json.dumps(row) + "\n" for row in ROWS[:4]), encoding="utf-8")
    two = config(id2label={"0": "animals", "1": "weather"}, label2id={"animals": 0, "weather": 1})
    refused("classifier.bias (3,) (2,)", lambda: models.measure(models.copy(models.model, two)))


def test_what_a_fine_tuned_model_has_beyond_its_architecture_is_not_left_out(models: Models) -> None:
    fewer = models.copy(models.model, config(num_hidden_layers=1))
    refused("bert.encoder.layer.1. number of layers", lambda: models.measure(fewer))

    def adapter(copy: Path) -> None:
        added = {f"bert.encoder.layer.0.attention.self.query.lora_{ab}.weight": torch.ones(2, 2) for ab in "AB"}
        save_file({**load_file(copy / WEIGHTS), **added}, copy / WEIGHTS, metadata={"format": "pt"})

    adapted = models.copy(models.model, adapter)
    refused("query.lora_A.weight merge_and_unload()", lambda: models.measure(adapted))
    refused("query.lora_A.weight merge_and_unload()", lambda: models.lock(adapted))


def test_only_the_head_and_the_pooler_of_a_base_may_be_new(models: Models) -> None:
    refused("bert.encoder.layer.1. base", lambda: models.lock(models.copy(models.base, without("layer.1."))))
    refused("encoder.layer.1.", lambda: models.lock(models.copy(models.base, config(num_hidden_layers=1))))
    refused("word_embeddings.weight", lambda: models.lock(models.copy(models.base, config(vocab_size=400))))
    assert models.lock(models.copy(models.base, without("pooler")))

    def pretrained(copy: Path) -> None:
        """As a model that fills in words is saved: with another head, and without a pooler."""
        body = transformers.AutoModel.from_pretrained(models.base)
        whole = transformers.BertForMaskedLM(body.config)
        whole.bert.load_state_dict({n: t for n, t in body.state_dict().items() if "pooler" not in n})
        whole.save_pretrained(copy)

    assert models.lock(models.copy(models.base, pretrained))


def test_a_classifier_is_a_base_for_other_labels_unless_its_files_contradict_each_other(models: Models) -> None:
    locked = models.lock(models.model, labels='["yes", "no"]')
    again = models.lock(models.model, labels='["yes", "no"]')
    assert locked["base_sha256"] == again["base_sha256"]  # the new head is drawn by the plan's seed
    two = models.copy(models.model, config(id2label={"0": "a", "1": "b"}, label2id={"a": 0, "b": 1}))
    refused("classifier.bias (3,) (2,)", lambda: models.lock(two, labels='["yes", "no"]'))
    refused("classifier.bias (3,) (4,)", lambda: models.lock(two, labels='["a", "b", "c", "d"]'))


def test_an_output_layer_that_predicts_tokens_is_no_head_that_may_be_new(
    models: Models, pico_tokenizer: Any, tmp_path: Path
) -> None:
    body = transformers.LlamaConfig(
        vocab_size=len(pico_tokenizer),
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=24,
        tie_word_embeddings=False,
    )
    transformers.LlamaModel(body).save_pretrained(tmp_path / "body")
    pico_tokenizer.save_pretrained(tmp_path / "body")
    refused("lm_head.weight", lambda: models.lock(tmp_path / "body", task='"causal-lm"', labels="[]"))


def test_no_text_becomes_unknown_because_the_tokenizer_is_missing_or_empty(models: Models) -> None:
    def none(copy: Path) -> None:
        for path in copy.glob("tokenizer*"):
            path.unlink()

    def empty(copy: Path) -> None:
        none(copy)
        transformers.AutoTokenizer.from_pretrained(copy).save_pretrained(copy)

    for change, named in ((none, "tokenizer.json"), (empty, "100% unknown")):
        refused(named, lambda change=change: models.lock(models.copy(models.base, change)))  # type: ignore[misc]
        refused(named, lambda change=change: models.measure(base=models.copy(models.base, change)))  # type: ignore[misc]


def test_every_token_has_a_row_in_the_table_or_the_first_without_is_named(models: Models) -> None:
    def added(special: bool) -> Change:
        def change(copy: Path) -> None:
            tokenizer = transformers.AutoTokenizer.from_pretrained(copy)
            tokenizer.add_tokens(["<mine>"], special_tokens=special)
            tokenizer.save_pretrained(copy)

        return change

    refused("'<mine>' resize_token_embeddings", lambda: models.lock(models.copy(models.base, added(False))))
    assert models.lock(models.copy(models.base, added(True)))  # as Gemma has one for images, which no text has


def llama(directory: Path, pico_tokenizer: Any, **tokens: int | None) -> Path:
    """A decoder whose configuration says what it is told of special tokens."""
    torch.manual_seed(4)
    settings = transformers.LlamaConfig(
        vocab_size=len(pico_tokenizer),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        **{"bos_token_id": 2, "eos_token_id": 3, "pad_token_id": None, **tokens},
    )
    transformers.LlamaModel(settings).save_pretrained(directory)
    pico_tokenizer.save_pretrained(directory)
    return directory


def test_a_configuration_that_names_no_padding_gets_that_of_the_tokenizer(
    tmp_path: Path, pico_tokenizer: Any, models: Models
) -> None:
    decoder = Models(llama(tmp_path / "decoder", pico_tokenizer), tmp_path / "of decoder")
    assert decoder.measure()["examples"] == len(ROWS)
    assert decoder.lock(decoder.base)


def test_a_tokenizer_with_neither_padding_nor_an_end_is_refused(models: Models) -> None:
    def neither(copy: Path) -> None:
        backend = transformers.AutoTokenizer.from_pretrained(copy).backend_tokenizer
        for path in copy.glob("tokenizer*"):
            path.unlink()
        transformers.PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]").save_pretrained(copy)

    refused("pad_token eos_token", lambda: models.lock(models.copy(models.base, neither)))


def test_texts_are_no_longer_than_the_model_has_places_for(models: Models, tmp_path: Path) -> None:
    long = {"text": " ".join(["the cat"] * 40), "label": "animals"}
    models.data.write_text(json.dumps(long) + "\n" + json.dumps(ROWS[2]) + "\n", encoding="utf-8")
    file = read_statistics(models.measure()["file"])
    assert file.about.task.max_length == 32
    assert set(file.tokens.values()) == {2, 32 + 5}  # the head has one row for an example; the long text was cut
    refused("max-length 64 32", lambda: models.measure(None, None, "--max-length", 64), PlanError)
    refused("max-length 64 32", lambda: models.lock(models.base, **{"max-length": "64"}), PlanError)


def tokenizer(**parts: Any) -> Change:
    return lambda copy: edit(copy / "tokenizer.json", **parts)


def role(copy: Path) -> None:
    edit(copy / "tokenizer_config.json", cls_token="[SEP]", sep_token="[CLS]")


@pytest.mark.parametrize(
    ("change", "part"),
    [
        (tokenizer(normalizer={"type": "Lowercase"}), "backend.normalizer"),
        (tokenizer(pre_tokenizer={"type": "WhitespaceSplit"}), "backend.pre_tokenizer"),
        (tokenizer(post_processor=None), "backend.post_processor"),
        (role, "special.cls_token"),
        (lambda copy: edit(copy / "tokenizer_config.json", truncation_side="left"), "settings.truncation_side"),
    ],
    ids=["normalizer", "pre-tokenizer", "post-processor", "special", "truncation"],
)
def test_the_same_vocabulary_by_other_rules_is_another_tokenizer_on_every_way(
    models: Models, change: Change, part: str, tmp_path: Path
) -> None:
    other, tuned = models.copy(models.base, change), models.copy(models.model, change)
    refused(f"tokenizers {part}", lambda: models.measure(base=other))
    refused(f"tokenizers {part} save the base's fine-tune again", lambda: models.measure(tuned))
    mine, theirs = models.measure()["file"], models.measure(tuned, other, "--name", "theirs")["file"]
    out = ("-o", tmp_path / "merged", "--base")
    bases = "bases different tokenizers measure all with the same --base"
    refused(bases, lambda: gramfuse("merge", mine, theirs, *out, models.base), ContributionError)
    refused("not the base tokenizers", lambda: gramfuse("merge", mine, *out, other))
    project = models.project(models.base)
    gramfuse("plan", "lock", project)
    plan = (project / "plan.toml").read_text(encoding="utf-8")
    (project / "plan.toml").write_text(plan.replace(str(models.base), str(other)), encoding="utf-8")
    refused("tokenizer model.processor", lambda: gramfuse("plan", "show", project))
    refused("tokenizer model.processor", lambda: load_base(Plan.read(project / "plan.toml"), project))


def shortened(keep: Callable[[int], int]) -> Change:
    def change(copy: Path) -> None:
        weights = (copy / WEIGHTS).read_bytes()
        (copy / WEIGHTS).write_bytes(weights[: keep(len(weights))])

    return change


@pytest.mark.parametrize("keep", [lambda size: size - 1, lambda size: size // 2, lambda size: 100, lambda size: 0])
def test_weights_that_were_cut_off_are_to_be_had_again(models: Models, keep: Callable[[int], int]) -> None:
    model, base = models.copy(models.model, shortened(keep)), models.copy(models.base, shortened(keep))
    refused(f"model {model} cut off again", lambda: models.measure(model))
    refused(f"base {base} cut off again", lambda: models.lock(base))
    refused(f"base {base} cut off again", lambda: models.measure(base=base))


def adapter(copy: Path) -> None:
    (copy / "adapter_config.json").write_text('{"peft_type": "LORA"}', encoding="utf-8")


def alone(copy: Path) -> None:
    adapter(copy)
    for name in ("config.json", WEIGHTS):
        (copy / name).unlink()


def test_an_adapter_alone_or_beside_a_model_is_to_be_merged_into_it_first(models: Models) -> None:
    for change, named in ((adapter, "beside"), (alone, "without")):
        model, base = models.copy(models.model, change), models.copy(models.base, change)
        for what in (lambda m=model: models.measure(m), lambda b=base: models.measure(base=b)):  # type: ignore[misc]
            refused(f"adapter_config.json {named} merge_and_unload()", what)
        refused(f"adapter_config.json {named} merge_and_unload()", lambda base=base: models.lock(base))  # type: ignore[misc]


def test_a_model_that_is_its_own_base_has_nothing_to_merge(models: Models) -> None:
    for base in (models.model, models.copy(models.model)):
        refused("same weights zero --base", lambda base=base: models.measure(base=base))  # type: ignore[misc]


def test_a_directory_of_checkpoints_is_pointed_into(models: Models, tmp_path: Path) -> None:
    for step in (500, 1500):
        shutil.copytree(models.model, tmp_path / "trained" / f"checkpoint-{step}")
    refused("checkpoint-1500", lambda: models.measure(tmp_path / "trained"))
    shutil.copy(models.model / "config.json", tmp_path / "trained")
    refused("checkpoint-1500", lambda: models.lock(tmp_path / "trained"))
    assert models.measure(tmp_path / "trained" / "checkpoint-1500")


def test_no_batch_is_no_measurement(models: Models) -> None:
    plan = plan_for("base", str(models.base), Task(task="classification", labels=("a", "b"), max_length=16))
    base = load_zero_headed(plan, Path())
    layout = plan_layout(plan, base)
    batches = iter([dict(base.tokenizer(["the cat"], return_tensors="pt"))])
    given = {"base": trainable(base.model), "examples": 1}
    assert collect_statistics(base.model, batches, layout, **given).examples == 1
    refused("no batches", lambda: collect_statistics(base.model, batches, layout, **given), ContributionError)


def test_a_model_of_one_example_among_those_of_many_is_told_where_it_weighs_as_much(
    models: Models, tmp_path: Path
) -> None:
    many = models.measure(None, None, "--name", "many")["file"]
    models.data.write_text(json.dumps(ROWS[0]) + "\n", encoding="utf-8")
    one = tmp_path / "one.safetensors"
    given = ["measure", models.model, "--base", models.base, "--data", models.data, "-o", one, "--name", "one"]
    assert "1 examples are few" in CliRunner().invoke(cli, [*map(str, given)]).stderr
    report = gramfuse("merge", many, one, "-o", tmp_path / "merged", "--base", models.base)
    assert shares(report) == {("one", 3.5, "ok")}  # 1 of 7 examples has half of the weight
    models.data.write_text("".join(json.dumps(row) + "\n" for row in ROWS * 10), encoding="utf-8")
    more = models.measure(None, None, "--name", "more")["file"]
    report = gramfuse("merge", more, one, "-o", tmp_path / "again", "--base", models.base)
    assert shares(report) == {("one", 30.5, "look")}
    report = gramfuse("merge", more, one, "-o", tmp_path / "third", "--base", models.base, "--weighting", "examples")
    assert shares(report) == set()


def shares(report: dict[str, Any]) -> set[tuple[str, float, str]]:
    return {(c["where"], c["value"], c["verdict"]) for c in report["checks"] if c["name"] == "share"}


HALVES = {"bfloat16": torch.bfloat16, "float16": torch.float16}


def saved_as(half: torch.dtype, *, frozen: Path | None = None) -> Change:
    """Save a model in half precision, with the embeddings of another if it is to have those."""

    def change(copy: Path) -> None:
        tensors = load_file(copy / WEIGHTS)
        if frozen is not None:
            of = load_file(frozen / WEIGHTS)
            tensors |= {f"bert.{name}": tensor for name, tensor in of.items() if name.startswith("embeddings.")}
        save_file({name: t.to(half) for name, t in tensors.items()}, copy / WEIGHTS, metadata={"format": "pt"})
        edit(copy / "config.json", dtype=str(half).removeprefix("torch."))

    return change


@pytest.mark.parametrize("half", HALVES.values(), ids=HALVES)
def test_frozen_embeddings_of_a_model_in_half_precision_are_those_of_the_base(
    models: Models, half: torch.dtype
) -> None:
    model = models.copy(models.model, saved_as(half, frozen=models.base))
    for base in (models.base, models.copy(models.base, saved_as(half))):
        file = read_statistics(models.measure(model, base, "--freeze", "embeddings")["file"])
        assert not any("embeddings" in tensor.name for tensor in file.about.layout.tensors)
    changed = models.copy(models.model, saved_as(half))
    refused("embeddings. frozen", lambda: models.measure(changed, None, "--freeze", "embeddings"))


@pytest.mark.parametrize("half", HALVES.values(), ids=HALVES)
def test_models_that_transformers_loads_in_half_precision_merge_to_one_of_the_same(
    models: Models, half: torch.dtype
) -> None:
    directories = [models.copy(models.base, saved_as(half)), models.copy(models.model, saved_as(half))]
    base, model = (
        transformers.AutoModelForSequenceClassification.from_pretrained(directory, num_labels=3)
        for directory in directories
    )
    tokenizer = transformers.AutoTokenizer.from_pretrained(models.base)
    batch = dict(tokenizer([row["text"] for row in ROWS], padding=True, return_tensors="pt"))
    start, layout = trainable(base), derive_layout(base, batch)
    assert {array.dtype.name for array in start.values()} == {"float32"}
    statistics = [collect_statistics(model, [batch], layout, base=start, examples=len(ROWS)) for _ in range(2)]
    add_differences(base, merge(statistics, layout).deltas)
    own = dict(model.named_parameters())
    for name, parameter in base.named_parameters():
        assert parameter.dtype == half
        assert torch.equal(parameter, own[name]), name


def grown(copy: Path) -> None:
    """Give a model a token more, as people do."""
    with_token = transformers.AutoTokenizer.from_pretrained(copy)
    with_token.add_tokens(["<mine>"])
    with_token.save_pretrained(copy)
    auto = transformers.AutoModel if "Classification" not in (copy / "config.json").read_text() else None
    auto = auto or transformers.AutoModelForSequenceClassification
    model = auto.from_pretrained(copy)
    model.resize_token_embeddings(len(with_token))
    model.save_pretrained(copy)


def test_a_model_with_a_token_more_is_merged_over_a_base_that_has_it_too(models: Models, tmp_path: Path) -> None:
    model = models.copy(models.model, grown)
    refused("rows resize_token_embeddings", lambda: models.measure(base=models.copy(models.base, grown)))
    base = models.copy(models.base, grown)
    files = [models.measure(model, base, "--name", name)["file"] for name in ("one", "two")]
    gramfuse("merge", *files, "-o", tmp_path / "merged", "--base", base)
    own, merged = (load_file(directory / WEIGHTS) for directory in (model, tmp_path / "merged"))
    for name, tensor in own.items():
        assert torch.allclose(tensor, merged[name], atol=1e-5), name


@pytest.mark.parametrize(
    ("kind", "error"),
    [
        (transformers.PreTrainedModel, OSError(errno.ENOSPC, "No space left on device")),
        (transformers.PreTrainedModel, SafetensorError("I/O error: No space left on device (os error 28)")),
        (transformers.PreTrainedTokenizerBase, Exception("No space left on device (os error 28)")),
    ],
    ids=["weights", "weights in Rust", "tokenizer in Rust"],
)
def test_a_merge_that_finds_no_room_says_so_and_leaves_nothing(
    models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: type, error: Exception
) -> None:
    def full(self: Any, directory: Path, **_: Any) -> None:
        Path(directory).mkdir(exist_ok=True)
        (Path(directory) / "begun").write_bytes(b"half of it")
        raise error

    file = models.measure()["file"]
    monkeypatch.setattr(kind, "save_pretrained", full)
    place = tmp_path / "place"
    place.mkdir()
    merging = ("merge", file, "-o", place / "merged", "--base", models.base)
    refused("no space left on the disk", lambda: gramfuse(*merging), RunDirectoryError)
    assert list(place.iterdir()) == []
