"""The table of architectures in docs/tasks.md: its rows are the script's, and what it says is so."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForSequenceClassification

from architectures import ARCHITECTURES
from families import Workplace, line, make
from gramfuse_model.loading.base_model import load_base
from gramfuse_model.loading.zero_head import load_zero_headed
from gramfuse_model.probing.suitable import check_answers
from gramfuse_protocol.errors import ModelError

DOCUMENT = (Path(__file__).parents[2] / "docs" / "tasks.md").read_text(encoding="utf-8")
TABLE = DOCUMENT.partition("<!-- table families -->")[2].partition("<!-- end -->")[0]
ROWS = [row for row in TABLE.splitlines() if row.startswith("| ") and "| `" in row]
SAMPLE = (
    *("bert", "deberta", "deberta-v3", "longformer", "xlnet", "funnel", "led", "bart-classifier", "falcon", "mixtral"),
    *("qwen2", "swin, padded inside", "resnet", "fnet", "reformer", "siglip"),
)


def test_the_table_has_a_row_for_each_architecture_that_the_script_tries() -> None:
    assert sorted(row.split(" | ")[0].removeprefix("| ") for row in ROWS) == sorted(ARCHITECTURES)
    merged = [row.split("|")[4:9] for row in ROWS if row.count("|") > 4]
    assert len(merged) >= 45
    for _, sizes, other, itself, loaded in merged:
        assert {sizes, itself, loaded} == {" same "}
        assert other.strip() in ("same", "refused", "")


@pytest.mark.parametrize("name", SAMPLE)
def test_an_architecture_does_what_the_table_says(name: str) -> None:
    assert line(name)[0] in ROWS


def test_a_base_that_gives_no_logits_is_refused_before_anything_is_trained(tmp_path: Path) -> None:
    for name in ("clip", "pp_lcnet"):
        place = Workplace(tmp_path / name, ARCHITECTURES[name])
        base = load_base(place.plan(place.save("base", make(name))), tmp_path)
        if name == "clip":
            check_answers(base)
            continue
        with pytest.raises(ModelError, match=r"PPLCNetForImageClassification .*last_hidden_state .*no logits"):
            check_answers(base)


@pytest.mark.parametrize("name", ["modernbert", "eurobert"])
def test_a_new_head_takes_the_mean_over_tokens_where_the_class_can(name: str, tmp_path: Path) -> None:
    place = Workplace(tmp_path, ARCHITECTURES[name])
    whole = make(name)
    trained = load_base(place.plan(place.save("trained", whole)), tmp_path).model
    assert trained.config.classifier_pooling == whole.config.classifier_pooling != "mean"

    base = load_base(place.plan(place.save("base", whole.base_model)), tmp_path)
    tokens = base.tokenizer(["cow sheep", "a horse with old dog near"], padding=True, return_tensors="pt")
    states = base.model.eval().base_model(**tokens).last_hidden_state
    mask = tokens["attention_mask"][:, :, None]
    mean = (states * mask).sum(dim=1) / mask.sum(dim=1)
    inputs: list[torch.Tensor] = []
    first = base.model.head if name == "modernbert" else base.model.dense
    first.register_forward_pre_hook(lambda _, given: inputs.append(given[0]))
    logits = base.model(**tokens).logits
    assert torch.allclose(inputs[0], mean, atol=1e-6)
    base.model.save_pretrained(tmp_path / "written")
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "written").eval()
    assert torch.allclose(again(**tokens).logits, logits, atol=1e-6)


def test_the_base_of_a_model_that_others_fine_tuned_pools_as_it_was_saved(tmp_path: Path) -> None:
    place = Workplace(tmp_path, ARCHITECTURES["modernbert"])
    base = place.save("base", make("modernbert").base_model)
    plan = place.plan(base)
    assert load_zero_headed(plan, tmp_path).model.config.classifier_pooling == "cls"
    assert load_base(plan, tmp_path).model.config.classifier_pooling == "mean"
