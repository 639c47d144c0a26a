"""The digests of a base model: the same for the same model wherever it lies, and another for whatever computes else."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import transformers

from gramfuse_model.digests import config_digest, processor_digest
from gramfuse_model.loading.base_model import Base, load_base
from gramfuse_protocol.contract.plan import Plan
from gramfuse_protocol.contract.plan_sections import Pins
from gramfuse_protocol.errors import ModelError

Pico = Callable[[str], Path]

LABELLED = 'labels = ["a", "b", "c"]'
TASKS = {
    "t5": 'task = "sequence-to-sequence"',
    "gpt2": 'task = "causal-lm"',
    "vit": f'task = "image-classification"\n{LABELLED}',
}


def base_of(directory: Path, task: str = f'task = "classification"\n{LABELLED}') -> Base:
    plan = f'[plan]\nname = "x"\n[model]\nbase = "{directory}"\n{task}\n'
    return load_base(Plan.parse(f'{plan}[privacy]\nsecure-aggregation = false\n[[silo]]\nname = "one"\n'), Path())


def edit(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    document = json.loads(path.read_text(encoding="utf-8"))
    change(document)
    path.write_text(json.dumps(document), encoding="utf-8")


@pytest.mark.parametrize("family", ["bert", "gpt2", "t5", "vit"])
def test_a_model_that_was_saved_again_elsewhere_is_the_same(pico: Pico, tmp_path: Path, family: str) -> None:
    task = TASKS.get(family, f'task = "classification"\n{LABELLED}')
    base = base_of(pico(family), task)
    if family != "vit":
        base.tokenizer(["the cat", "a dog and a cat"], padding=True, truncation=True, max_length=3)  # has a state
    copy = tmp_path / "copy of it"
    base.model.save_pretrained(copy)
    base.tokenizer.save_pretrained(copy)
    edit(copy / "config.json", lambda c: c.update(transformers_version="4.0.0", _name_or_path="x", dtype="float16"))
    (copy / "README.md").write_text("read by nobody", encoding="utf-8")
    again = base_of(copy, task)
    assert again.pins == base.pins
    assert None not in again.pins[:3]
    again.model.config._attn_implementation = "eager"
    assert config_digest(again.model) == base.pins.config


def test_a_body_and_its_half_precision_files_are_the_same_base(pico: Pico, tmp_path: Path) -> None:
    body = transformers.AutoModel.from_pretrained(pico("bert")).bfloat16()
    body.save_pretrained(tmp_path / "half")
    transformers.AutoTokenizer.from_pretrained(pico("bert")).save_pretrained(tmp_path / "half")
    half = base_of(tmp_path / "half")
    half.model.save_pretrained(tmp_path / "whole")  # float32, and with a head
    half.tokenizer.save_pretrained(tmp_path / "whole")
    assert base_of(tmp_path / "whole").pins == half.pins


def test_another_process_finds_the_same(pico: Pico) -> None:
    script = (
        "import sys; from pathlib import Path; from gramfuse_model.loading.base_model import load_base; "
        "from gramfuse_protocol.contract.plan import Plan\n"
        "for text in sys.argv[1:]: print(*load_base(Plan.parse(text), Path()).pins)"
    )
    plans, expected = [], []
    for family in ("bert", "t5"):
        task = TASKS.get(family, f'task = "classification"\n{LABELLED}')
        plans.append(
            f'[plan]\nname = "x"\n[model]\nbase = "{pico(family)}"\n{task}\n'
            '[privacy]\nsecure-aggregation = false\n[[silo]]\nname = "one"\n'
        )
        expected.append(" ".join(map(str, base_of(pico(family), task).pins)))
    environment = {**os.environ, "PYTHONHASHSEED": "7", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", script, *plans], capture_output=True, text=True, env=environment)
    assert done.stdout.splitlines() == expected, done.stderr


def test_every_key_of_a_configuration_counts_but_names_versions_and_labels(pico: Pico) -> None:
    for family in ("bert", "gpt2", "t5", "vit"):
        base = base_of(pico(family), TASKS.get(family, f'task = "classification"\n{LABELLED}'))
        config, free = base.model.config, set()
        for key in config.to_dict().keys() - {"dtype", "model_type"}:  # a class is not set
            before = config.__dict__.get(key)
            config.__dict__[key] = ["another"]
            if config_digest(base.model) == base.pins.config:
                free.add(key)
            config.__dict__[key] = before
        names = {"_name_or_path", "architectures", "transformers_version"}
        labels = {"id2label", "label2id", "problem_type"}
        assert free - labels == names | {"output_attentions"}, family  # which has another name in there
        config._output_attentions = True
        assert config_digest(base.model) != base.pins.config


def test_how_texts_are_generated_counts_where_they_are(pico: Pico, tmp_path: Path) -> None:
    settings = [
        {"max_length": 3},
        {"forced_bos_token_id": 5},
        {"forced_eos_token_id": 5},
        {"repetition_penalty": 9.0},
        {"suppress_tokens": [4, 5]},
        {"no_repeat_ngram_size": 1},
        {"decoder_start_token_id": 7},
        {"bad_words_ids": [[4]]},
    ]
    found = {base_of(pico("t5"), TASKS["t5"]).pins.config}
    for number, changed in enumerate(settings):
        copy = shutil.copytree(pico("t5"), tmp_path / str(number))
        edit(copy / "generation_config.json", lambda c, changed=changed: c.update(changed))
        found.add(base_of(copy, TASKS["t5"]).pins.config)
    assert len(found) == 1 + len(settings)
    # A language model generates nothing in a run.
    copy = shutil.copytree(pico("gpt2"), tmp_path / "gpt2")
    edit(copy / "generation_config.json", lambda c: c.update(repetition_penalty=9.0))
    assert base_of(copy, TASKS["gpt2"]).pins == base_of(pico("gpt2"), TASKS["gpt2"]).pins


def backend(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    return lambda copy: edit(copy / "tokenizer.json", change)


def setting(**settings: Any) -> Callable[[Path], None]:
    return lambda copy: edit(copy / "tokenizer_config.json", lambda c: c.update(settings))


REPLACE = {"type": "Replace", "pattern": {"String": "cat"}, "content": "the"}
ADDED = {"content": "cat dog", "single_word": False, "lstrip": False, "rstrip": False, "normalized": True}


@pytest.mark.parametrize(
    "change",
    [
        backend(lambda t: t.update(normalizer=REPLACE)),
        backend(lambda t: t.update(pre_tokenizer={"type": "WhitespaceSplit"})),
        backend(lambda t: t.update(post_processor=None)),
        backend(lambda t: t["added_tokens"].append({**ADDED, "id": 40, "special": False})),
        backend(lambda t: t["added_tokens"][0].update(normalized=True)),
        backend(lambda t: t["model"].update(unk_token="the")),
        backend(lambda t: t["model"]["vocab"].update(cat=20, cow=19)),
        setting(unk_token="the"),
        setting(pad_token="the"),
        setting(extra_special_tokens=["cat"]),
        setting(padding_side="left"),
        setting(truncation_side="left"),
        setting(model_max_length=5),
        setting(model_input_names=["input_ids"]),
        setting(clean_up_tokenization_spaces=True),
        setting(split_special_tokens=True),
        setting(eos_token="[SEP]", add_eos_token=True),
        setting(tokenizer_class="BertTokenizer", do_lower_case=True),
    ],
)
def test_all_that_a_tokenizer_does_counts(pico: Pico, tmp_path: Path, change: Callable[[Path], None]) -> None:
    copy = shutil.copytree(pico("bert"), tmp_path / "copy")
    before = base_of(copy).pins
    change(copy)
    try:
        changed = base_of(copy).pins
    except ModelError:
        return
    assert changed.processor != before.processor


@pytest.mark.parametrize(
    "change",
    [
        {"image_mean": [0.5, 0.5, 0.4]},
        {"image_std": [0.5, 0.4, 0.5]},
        {"size": {"height": 8, "width": 9}},
        {"do_resize": False},
        {"do_normalize": False},
        {"do_rescale": False},
        {"rescale_factor": 0.5},
        {"resample": 0},
        {"do_center_crop": True},
    ],
)
def test_all_that_an_image_processor_does_counts(pico: Pico, tmp_path: Path, change: dict[str, Any]) -> None:
    copy = shutil.copytree(pico("vit"), tmp_path / "copy")
    edit(copy / "preprocessor_config.json", lambda c: c.update(change))
    assert base_of(copy, TASKS["vit"]).pins.processor != base_of(pico("vit"), TASKS["vit"]).pins.processor


def gpt2() -> Any:
    tokenizer = transformers.GPT2Tokenizer(
        vocab={"<|endoftext|>": 0, "a": 1, "b": 2, "ab": 3, "Ġ": 4, "Ġa": 5}, merges=[("a", "b"), ("Ġ", "a")]
    )
    tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def bert(directory: Path) -> Any:
    (directory / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\nthe\ncat\n", encoding="utf-8")
    return transformers.BertTokenizer.from_pretrained(directory)


def t5() -> Any:
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁a", -1.0), ("b", -2.0)]
    return transformers.T5Tokenizer(vocab=pieces)


@pytest.mark.parametrize("kind", ["gpt2", "bert", "t5", "byt5"])
def test_tokenizers_of_every_make_are_known_again(tmp_path: Path, kind: str) -> None:
    make = {"gpt2": gpt2, "bert": lambda: bert(tmp_path), "t5": t5, "byt5": transformers.ByT5Tokenizer}
    tokenizer = make[kind]()
    before = processor_digest(tokenizer)
    tokenizer(["a b ab", "a"], padding="longest", truncation=True, max_length=2)
    for place in ("one", "another"):
        tokenizer.save_pretrained(tmp_path / place)
        (tmp_path / place / "config.json").write_text(
            json.dumps({"model_type": "t5" if kind == "byt5" else kind}), encoding="utf-8"
        )
        tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / place)
        assert processor_digest(tokenizer) == before
    tokenizer.add_tokens(["cat"])
    assert processor_digest(tokenizer) != before


def test_what_cannot_be_pinned_is_refused() -> None:
    with pytest.raises(ModelError):
        processor_digest(object())


def test_pins_of_a_model_with_its_own_heads_have_what_the_files_bring(pico: Pico, tmp_path: Path) -> None:
    """A silo's head is its own, but what the files say that it starts from is not."""
    own = f'task = "classification"\n{LABELLED}\nhead = "own"'
    body = base_of(pico("bert"), own).pins
    assert base_of(pico("bert"), own).pins == body
    whole = base_of(pico("bert")).model
    found: set[Pins] = {body}
    for value in (0.0, 1e6):
        whole.classifier.weight.data.fill_(value)
        whole.save_pretrained(tmp_path / str(value))
        transformers.AutoTokenizer.from_pretrained(pico("bert")).save_pretrained(tmp_path / str(value))
        found.add(base_of(tmp_path / str(value), own).pins)
    assert len(found) == 3
    assert len({pins.config for pins in found} | {pins.processor for pins in found}) == 2
