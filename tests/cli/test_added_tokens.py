"""Models to which tokens were added: what they share with their base is merged, and the rest where it is asked for."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from gramfuse_cli.main import cli
from gramfuse_protocol.errors import ContributionError, GramfuseError, ModelError, PlanError
from gramfuse_protocol.statistics.file import read_statistics
from tests.commands import gramfuse
from tests.projects import bert_config
from tests.reports import read_back

TEXTS = ["the old cat and a dog", "my horse near the big goat", "rain and wind", "the snow of a storm", "a small pan"]
LABELS = ["animals", "weather"]


def _bert(tokens: int) -> Any:
    labels = {"id2label": dict(enumerate(LABELS)), "label2id": {label: n for n, label in enumerate(LABELS)}}
    return transformers.BertForSequenceClassification(bert_config(tokens, **labels))


def _llama(tokens: int) -> Any:
    config = transformers.LlamaConfig(
        vocab_size=tokens,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        tie_word_embeddings=False,
        bos_token_id=2,
        eos_token_id=3,
        pad_token_id=0,
    )
    return transformers.LlamaForCausalLM(config)


def _t5(tokens: int) -> Any:
    config = transformers.T5Config(
        vocab_size=tokens,
        d_model=16,
        num_layers=2,
        num_heads=2,
        d_ff=24,
        d_kv=8,
        decoder_start_token_id=0,
        pad_token_id=0,
        eos_token_id=3,
    )
    return transformers.T5ForConditionalGeneration(config)


def _bart(tokens: int) -> Any:
    config = transformers.BartConfig(
        vocab_size=tokens,
        d_model=16,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=24,
        decoder_ffn_dim=24,
        max_position_embeddings=64,
        pad_token_id=0,
        bos_token_id=2,
        eos_token_id=3,
        decoder_start_token_id=3,
        forced_eos_token_id=3,
    )
    return transformers.BartForConditionalGeneration(config)


FAMILIES: dict[str, tuple[Callable[[int], Any], tuple[str, ...]]] = {
    "classifier": (_bert, ("bert.embeddings.word_embeddings.weight",)),
    "untied decoder": (_llama, ("model.embed_tokens.weight", "lm_head.weight")),
    "tied encoder-decoder": (_t5, ("shared.weight",)),
    "with a bias of logits": (_bart, ("model.shared.weight",)),
}
"""How a base is made, and the names of its trained tables with rows of tokens."""


@dataclass
class Grown:
    """A base, and models that were fine-tuned from it, with and without tokens of their own."""

    directory: Path
    tokenizer: Any
    make: Callable[[int], Any]
    rows: int

    def __post_init__(self) -> None:
        self.directory.mkdir(exist_ok=True)
        torch.manual_seed(5)
        model = self.make(self.rows)
        self.auto = type(model)
        model.save_pretrained(self.base)
        self.tokenizer.save_pretrained(self.base)
        # A decoder learns from texts, a model that answers from targets, and a label does for a classifier.
        rows = [{"text": t, "target": t[:9], "label": LABELS[n % 2]} for n, t in enumerate(TEXTS)]
        self.data = self.directory / "train.jsonl"
        self.data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")

    @property
    def base(self) -> Path:
        return self.directory / "base"

    def tokens(self, name: str, tokens: Iterable[str]) -> Path:
        """Save the base's tokenizer with tokens added to it."""
        tokenizer = transformers.AutoTokenizer.from_pretrained(self.base)
        tokenizer.add_tokens(list(tokens))
        tokenizer.save_pretrained(self.directory / name)
        return self.directory / name

    def tuned(
        self, name: str, tokens: Iterable[str] = (), multiple: int | None = None, *, resized: bool = True
    ) -> Path:
        """Fine-tune, by noise that depends on the name only, and then on the rows of added tokens too."""
        path = self.tokens(name + ("-grown" if tokens else ""), tokens)
        model = self.auto.from_pretrained(self.base)
        generator = torch.Generator().manual_seed(sum(name.encode()))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.02 * torch.randn(parameter.shape, generator=generator)
            if tokens and resized:
                count = len(transformers.AutoTokenizer.from_pretrained(path))
                model.resize_token_embeddings(count, pad_to_multiple_of=multiple, mean_resizing=False)
                for table in {model.get_input_embeddings(), model.get_output_embeddings()} - {None}:
                    new = table.weight[self.rows :]
                    new.copy_(torch.randn(new.shape, generator=generator))
        model.save_pretrained(path)
        return path

    def measure(self, model: Path, *options: Any) -> Path:
        out = self.directory / f"{model.name}-{len(list(self.directory.iterdir()))}.safetensors"
        name = model.name.removesuffix("-grown")
        target = ("--label", "target") if "Generation" in self.auto.__name__ else ()
        given = ("--base", self.base, "--data", self.data, "-o", out, "--name", name)
        gramfuse("measure", model, *given, *target, *options)
        return out

    def merge(self, out: str, files: Iterable[Path], *options: Any) -> dict[str, torch.Tensor]:
        gramfuse("merge", *files, "--base", self.base, "-o", self.directory / out, *options)
        return load_file(self.directory / out / "model.safetensors")


@pytest.fixture
def grown(pico_tokenizer: Any, tmp_path: Path) -> Callable[..., Grown]:
    def make(family: str = "classifier", spare: int = 0) -> Grown:
        return Grown(tmp_path / "models", pico_tokenizer, FAMILIES[family][0], len(pico_tokenizer) + spare)

    return make


@pytest.mark.parametrize("family", FAMILIES)
def test_models_with_other_tokens_merge_as_without_and_keep_those_of_a_tokenizer(
    grown: Callable[..., Grown], family: str
) -> None:
    models = grown(family)
    plain, one, two = models.tuned("plain"), models.tuned("one"), models.tuned("two")
    without = models.merge("without", map(models.measure, (plain, one, two)), "--weight", "two=3")
    own = {"one": models.tuned("one", ("<a>", "<b>")), "two": models.tuned("two", ("<b>", "\n", "<c d>"), 16)}
    files = [models.measure(plain), *map(models.measure, own.values())]
    assert read_statistics(files[2]).added == ("<b>", "\n", "<c d>")

    common = models.merge("common", files, "--weight", "two=3")
    assert common.keys() == without.keys()
    for name in without:
        assert torch.equal(common[name], without[name]), name
    merged_tokenizer = transformers.AutoTokenizer.from_pretrained(models.directory / "common")
    assert merged_tokenizer.get_vocab() == models.tokenizer.get_vocab()
    batch = models.tokenizer(TEXTS, padding=True, return_tensors="pt")
    inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    if models.auto(models.auto.config_class.from_pretrained(models.base)).config.is_encoder_decoder:
        inputs["decoder_input_ids"] = batch["input_ids"]

    def outputs(name: str) -> torch.Tensor:
        model = models.auto.from_pretrained(models.directory / name).eval()
        with torch.no_grad():
            logits: torch.Tensor = model(**inputs).logits
        return logits

    wanted = models.tokens("wanted", ("\n", "<b>", "<a>"))
    kept = models.merge("kept", files, "--weight", "two=3", "--tokenizer", wanted)
    expected = outputs("without")
    assert torch.equal(outputs("common"), expected)
    assert torch.allclose(outputs("kept")[..., : expected.shape[-1]], expected, atol=1e-6)
    tables = {name: load_file(path / "model.safetensors") for name, path in own.items()}
    for table in FAMILIES[family][1]:
        first, second = (tables[name][table] for name in ("one", "two"))
        a, b, end = first[models.rows], first[models.rows + 1], second[models.rows + 1]
        mean = ((b.double() + 3 * second[models.rows].double()) / 4).float()
        assert kept[table].shape[0] == models.rows + 3
        assert torch.equal(kept[table][models.rows :], torch.stack([end, mean, a]))
        assert torch.equal(kept[table][: models.rows], without[table])
    directory = models.directory / "kept"
    again = transformers.AutoTokenizer.from_pretrained(directory)
    assert again.get_vocab() == transformers.AutoTokenizer.from_pretrained(wanted).get_vocab()
    assert (
        again("cat <a> dog")["input_ids"]
        == transformers.AutoTokenizer.from_pretrained(wanted)("cat <a> dog")["input_ids"]
    )
    added = read_back(directory)["added_tokens"]
    assert added["kept"] == [
        {"token": "\n", "silos": ["two"]},
        {"token": "<b>", "silos": ["one", "two"]},
        {"token": "<a>", "silos": ["one"]},
    ]
    assert added["left_out"] == [{"token": "<c d>", "silos": ["two"]}]
    for page in ("README.md", "report.html"):
        text = (directory / page).read_text(encoding="utf-8")
        assert "Added tokens in the merged model" in text
        assert "Added tokens that were left out" in text
        assert (
            text.index("Added tokens in the merged model")
            < text.index("(one, two)")
            < text.index("&lt;c d&gt;" if "&lt;" in text else "<c d>")
        )


def test_the_weight_of_a_row_is_that_of_the_merge(grown: Callable[..., Grown]) -> None:
    models = grown()
    one, two = models.tuned("one", ("<b>",)), models.tuned("two", ("<b>",))
    files = [models.measure(one)]
    models.data.write_text("".join(models.data.read_text().splitlines(keepends=True)[:2]))
    files.append(models.measure(two))
    kept = models.merge("kept", files, "--weighting", "examples", "--tokenizer", one)
    (table,) = FAMILIES["classifier"][1]
    rows = [load_file(path / "model.safetensors")[table][models.rows].double() for path in (one, two)]
    assert torch.equal(kept[table][models.rows], ((5 * rows[0] + 2 * rows[1]) / 7).float())


def test_texts_are_measured_with_the_tokens_of_their_model(grown: Callable[..., Grown]) -> None:
    models = grown()
    one = models.tuned("one", ("<a>",))
    row = {"text": "cat <a> dog", "label": "animals"}
    models.data.write_text(json.dumps(row) + "\n", encoding="utf-8")
    seen = max(read_statistics(models.measure(one)).tokens.values())
    assert seen == 5  # [CLS] cat <a> dog [SEP]; the base makes seven of it
    spoken = CliRunner().invoke(
        cli,
        [str(a) for a in ("measure", one, "--base", models.base, "--data", models.data, "-o", models.directory / "x")],
    )
    assert "'<a>'" in spoken.stderr
    assert "--tokenizer" in spoken.stderr


def test_merge_says_what_it_left_out(grown: Callable[..., Grown]) -> None:
    models = grown()
    file = models.measure(models.tuned("one", ("<a>",), 64))
    said = CliRunner().invoke(
        cli, ["merge", str(file), "--base", str(models.base), "-o", str(models.directory / "merged")]
    )
    assert said.exit_code == 0
    for word in ("left out", "'<a>' (one)", "--tokenizer DIR"):
        assert word in said.stderr


def test_tokens_that_took_idle_rows_of_the_base_are_no_difference_from_it(grown: Callable[..., Grown]) -> None:
    models = grown("untied decoder", spare=3)
    names = {"one": ("<a>",), "two": ("<b>", "<c>", "<d>", "<e>")}
    one, two = models.tuned("one", names["one"], resized=False), models.tuned("two", names["two"])
    files = [models.measure(one), models.measure(two)]
    base = load_file(models.base / "model.safetensors")
    merged = models.merge("merged", files)
    wanted = models.tokens("wanted", ("<e>", "<a>"))
    kept = models.merge("kept", files, "--tokenizer", wanted)
    first = len(models.tokenizer)
    for table in FAMILIES["untied decoder"][1]:
        rows = [load_file(path / "model.safetensors")[table] for path in (one, two)]
        assert torch.equal(merged[table][first], base[table][first])  # "<a>" of one, "<b>" of the other
        assert torch.allclose(merged[table][first + 1], (rows[0][first + 1] + base[table][first + 1]) / 2, atol=0.02)
        assert torch.equal(kept[table][first], rows[1][first + 3])
        assert torch.equal(kept[table][first + 1], rows[0][first])
        assert kept[table].shape == base[table].shape


def test_a_padding_token_that_was_added_is_no_other_tokenizer(pico_gpt2: Path, tmp_path: Path) -> None:
    path, base = tmp_path / "padded", tmp_path / "base"
    shutil.copytree(pico_gpt2, base)
    model = transformers.GPT2ForSequenceClassification.from_pretrained(base, num_labels=2)
    tokenizer = transformers.AutoTokenizer.from_pretrained(base)
    tokenizer.add_special_tokens({"pad_token": "<pad>", "additional_special_tokens": ["<turn>"]})
    model.resize_token_embeddings(len(tokenizer))
    model.config.pad_token_id = tokenizer.pad_token_id
    with torch.no_grad():
        model.score.weight += 0.1
        for block in model.transformer.h:
            block.mlp.c_fc.weight += 0.05 * torch.randn(block.mlp.c_fc.weight.shape)
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    data = tmp_path / "train.jsonl"
    data.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS), encoding="utf-8")
    file = tmp_path / "x.safetensors"
    gramfuse("measure", path, "--base", base, "--data", data, "-o", file)
    gramfuse("merge", file, "--base", base, "-o", tmp_path / "merged", "--tokenizer", path)
    merged = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged").eval()
    assert merged.config.pad_token_id == tokenizer.pad_token_id
    batch = tokenizer(TEXTS, padding=True, return_tensors="pt")
    with torch.no_grad():
        assert torch.allclose(merged(**batch).logits, model.eval()(**batch).logits, atol=1e-4)


def test_rows_of_added_tokens_are_those_of_the_model_where_embeddings_are_frozen(grown: Callable[..., Grown]) -> None:
    models = grown()
    path = models.tuned("one", ("<a>",), 64)
    (table,) = FAMILIES["classifier"][1]
    tensors = load_file(path / "model.safetensors")
    refused(f"{table} --freeze one-grown {models.base}", lambda: models.measure(path, "--freeze", table))
    tensors[table][: models.rows] = load_file(models.base / "model.safetensors")[table]
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    kept = models.merge("kept", [models.measure(path, "--freeze", table)], "--tokenizer", path)
    assert torch.equal(kept[table], tensors[table][: models.rows + 1])


def test_a_tokenizer_that_is_written_in_python_grows_too(tmp_path: Path) -> None:
    tokenizer = transformers.ByT5Tokenizer()
    models = Grown(tmp_path / "bytes", tokenizer, _t5, len(tokenizer))
    files = [models.measure(models.tuned(name, tokens)) for name, tokens in (("one", ("<a>",)), ("two", ("<b>",)))]
    kept = models.merge("kept", files, "--tokenizer", models.tokens("wanted", ("<b>", "<a>")))
    rows = [read_statistics(file).rows("shared.weight") for file in files[::-1]]
    assert torch.equal(kept["shared.weight"][models.rows :], torch.cat([torch.from_numpy(r) for r in rows]))
    written = transformers.AutoTokenizer.from_pretrained(models.directory / "kept")
    assert written.convert_tokens_to_ids(["<b>", "<a>"]) == [models.rows, models.rows + 1]


def test_bodies_keep_added_tokens_too(grown: Callable[..., Grown]) -> None:
    models = grown()
    files = [models.measure(models.tuned(name, tokens)) for name, tokens in (("one", ("<a>",)), ("two", ("<b>",)))]
    wanted = models.tokens("wanted", ("<b>", "<a>"))
    out = models.directory / "bodies"
    gramfuse("merge", *files, "--base", models.base, "-o", out, "--heads", "own", "--tokenizer", wanted)
    (table,) = FAMILIES["classifier"][1]
    tables = [load_file(out / name / "model.safetensors")[table] for name in ("one", "two")]
    assert tables[0].shape[0] == models.rows + 2
    assert torch.equal(*tables)


def refused(names: str, what: Callable[[], object], kind: type[GramfuseError] = ModelError) -> None:
    """Check that something is refused with an error that has all of these words."""
    with pytest.raises(kind) as caught:
        what()
    missing = [name for name in names.split() if name not in str(caught.value)]
    assert not missing, f"{missing} not in {caught.value}"


def test_what_has_no_row_or_another_number_is_refused(grown: Callable[..., Grown], tmp_path: Path) -> None:
    models = grown()
    file = models.measure(models.tuned("one", ("<a>",)))

    def merge(tokenizer: Path) -> Callable[[], object]:
        return lambda: models.merge("merged", [file], "--tokenizer", tokenizer)

    unknown = models.tokens("unknown", ("<a>", "<nobody>"))
    refused("'<nobody>' '<a>' unknown", merge(unknown), ContributionError)
    refused("no such directory", merge(tmp_path / "nowhere"))
    renumbered = models.tokens("renumbered", ("<a>",))
    text = json.loads((renumbered / "tokenizer.json").read_text(encoding="utf-8"))
    vocabulary = text["model"]["vocab"]
    vocabulary["cat"], vocabulary["dog"] = vocabulary["dog"], vocabulary["cat"]
    (renumbered / "tokenizer.json").write_text(json.dumps(text), encoding="utf-8")
    refused("'cat' has number renumbered", merge(renumbered))
    other = models.tokens("other", ("<a>",))
    text = json.loads((other / "tokenizer.json").read_text(encoding="utf-8"))
    (other / "tokenizer.json").write_text(json.dumps(text | {"normalizer": {"type": "Lowercase"}}), encoding="utf-8")
    refused("backend.normalizer", merge(other))
    assert not (models.directory / "merged").exists()

    moved = models.tuned("moved", ("<a>",))
    shutil.copy(renumbered / "tokenizer.json", moved)
    refused(f"'cat' {moved} {models.base} different tokenizers", lambda: models.measure(moved))
    rowless = models.tuned("rowless", ("<a>",), resized=False)
    refused("'<a>' no embedding resize_token_embeddings", lambda: models.measure(rowless))
    fewer = models.tuned("fewer")
    model = models.auto.from_pretrained(fewer)
    model.resize_token_embeddings(models.rows - 1)
    model.save_pretrained(fewer)
    refused("resize_token_embeddings", lambda: models.measure(fewer))
    roomy = grown(spare=4)
    cut = roomy.tuned("cut")
    model = roomy.auto.from_pretrained(cut)
    model.resize_token_embeddings(roomy.rows - 4)
    model.save_pretrained(cut)
    refused(f"rows {cut} {roomy.base} resize_token_embeddings({roomy.rows})", lambda: roomy.measure(cut))


def test_tune_measures_no_models_without_the_tokens_that_they_were_fine_tuned_with(
    grown: Callable[..., Grown], tmp_path: Path
) -> None:
    models = grown()
    files = [models.measure(models.tuned(name, ("<a>",))) for name in ("one", "two")]
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps({"text": text, "label": 0}) + "\n" for text in TEXTS))
    options = ["--base", models.base, "--validation", data, "--test", data, "-o", tmp_path / "out"]
    told = CliRunner().invoke(cli, ["tune", *map(str, (*files, *options))])
    assert isinstance(told.exception, PlanError)
    assert "<a>" in str(told.exception)
    assert "--tokenizer" in str(told.exception)
    assert not (tmp_path / "out").exists()
