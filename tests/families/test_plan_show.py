"""`gramfuse plan show` for any family: what is merged in closed form, what is averaged, what stays at the silo."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from gramfuse_cli.main import cli
from gramfuse_protocol.errors import PlanError

LABELS = 'labels = ["a", "b", "c"]'


@pytest.fixture
def show(tmp_path: Path, pico: Callable[[str], Path]) -> Callable[..., tuple[str, dict[str, Any]]]:
    """Return a function: what is printed for a family's plan, and as JSON."""

    def run(family: str, model: str, silos: tuple[str, ...] = ("", ""), tasks: str = "") -> tuple[str, dict[str, Any]]:
        roster = "".join(f'[[silo]]\nname = "silo-{n}"\n{keys}\n' for n, keys in enumerate(silos))
        (tmp_path / "plan.toml").write_text(
            f'[plan]\nname = "shown"\n[model]\nbase = "{pico(family)}"\n{model}\n'
            f'[privacy]\nsecure-aggregation = false\nmetrics = "silo"\n{tasks}\n{roster}'
        )
        texts = []
        for options in ((), ("--json",)):
            result = CliRunner().invoke(cli, ["plan", "show", str(tmp_path), *options], catch_exceptions=False)
            assert result.exit_code == 0, result.output
            texts.append(result.stdout)
        return texts[0], json.loads(texts[1])

    return run


@pytest.mark.parametrize(
    ("family", "model", "closed", "averaged", "frozen"),
    [
        (
            "t5",
            'task = "sequence-to-sequence"\nmax-length = 16',
            "EncDecAttention.k",
            "layer_norm.weight",
            "shared.weight",
        ),
        (
            "gpt2",
            'task = "causal-lm"\nmax-length = 16',
            "transformer.h.1.attn.c_attn",
            "attn.c_attn.bias (×2)",
            "transformer.wte.weight",
        ),
        (
            "deberta-v2",
            f'task = "classification"\nmax-length = 16\n{LABELS}',
            "self.{query_proj,key_proj,value_proj}",
            "deberta.encoder.conv.conv.weight",
            "deberta.encoder.rel_embeddings.weight",
        ),
        (
            "vit",
            f'task = "image-classification"\n{LABELS}',
            "mlp.fc1",
            "mlp.fc1.bias (×2)",
            "patch_embeddings.projection",
        ),
    ],
    ids=["t5", "gpt2", "deberta-v2", "vit"],
)
def test_every_parameter_is_in_closed_form_averaged_or_frozen(
    show: Callable[..., tuple[str, dict[str, Any]]], family: str, model: str, closed: str, averaged: str, frozen: str
) -> None:
    text, shown = show(family, model)
    table, _, rest = text.partition("Averaged: ")
    assert closed in table
    assert "without context, so they are averaged: " in text
    assert shown["context_free"]
    assert set(shown["context_free"]) <= set(shown["averaged"])
    assert averaged in rest.partition("Frozen, never sent: ")[0]
    assert frozen in rest.partition("Frozen, never sent: ")[2]
    assert "Kept at the silo" not in text
    assert shown["kept"] == {"": []}


def test_heads_that_silos_keep_are_named_by_task(show: Callable[..., tuple[str, dict[str, Any]]]) -> None:
    tasks = f"""
        [[task]]
        name = "topics"
        task = "classification"
        {LABELS}
        max-length = 16
        [[task]]
        name = "names"
        task = "token-classification"
        labels = ["O", "B-X", "I-X"]
        max-length = 16
        """
    text, shown = show("bert", 'head = "own"', ('task = "topics"', 'task = "names"'), tasks)
    pooler, classifier = (
        ["bert.pooler.dense.weight", "bert.pooler.dense.bias"],
        ["classifier.weight", "classifier.bias"],
    )
    assert shown["kept"] == {"topics": [*pooler, *classifier], "names": classifier}
    assert "(topics): bert.pooler.dense.weight" in text
    assert not set(shown["averaged"]) & {*pooler, *classifier}


def test_a_masked_head_has_a_line_for_each_set_of_silos(show: Callable[..., tuple[str, dict[str, Any]]]) -> None:
    model = f'task = "multi-label"\nmax-length = 16\n{LABELS}'
    text, shown = show("roberta", model, ('labels = ["a", "b"]', 'labels = ["b", "c"]', ""))
    heads = [group for group in shown["groups"] if group["weights"] == ["classifier.out_proj.weight"]]
    assert [group["silos"] for group in heads] == [
        ["silo-0", "silo-2"],
        ["silo-0", "silo-1", "silo-2"],
        ["silo-1", "silo-2"],
    ]
    assert "classifier.out_proj (labels of silo-0, silo-2)" in text


def test_what_is_averaged_since_its_rows_are_no_tokens_is_named(
    show: Callable[..., tuple[str, dict[str, Any]]],
) -> None:
    text, shown = show("funnel", f'task = "classification"\nmax-length = 16\n{LABELS}')
    halved = "funnel.encoder.blocks.1.0"  # the second block sees two tokens at once
    assert shown["unmatched"]
    assert all(name.startswith(halved) for name in shown["unmatched"])
    assert not any(
        weight.startswith(halved)
        for group in shown["groups"]
        for weight in group["weights"]
        if "k_head" not in weight and "v_head" not in weight
    )
    assert 0.2 < shown["closed"] < 0.7
    assert f"{shown['closed']:.1%} of the trained parameters" in text
    assert "identified: funnel.encoder.blocks.1.0.attention.q_head" in text


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama"])
@pytest.mark.parametrize("secure", [False, True])
def test_an_estimate_from_the_configuration_has_the_sizes_of_the_locked_layout(
    tmp_path: Path, pico: Callable[[str], Path], family: str, secure: bool
) -> None:
    task = f'task = "classification"\n{LABELS}' if family == "bert" else 'task = "causal-lm"'
    roster = "".join(f'[[silo]]\nname = "silo-{n}"\n' for n in range(4))
    text = (
        f'[plan]\nname = "shown"\n[model]\nbase = "BASE"\nmax-length = 16\n{task}\n[training]\nfreeze = []\n'
        f'[training.lora]\nrank = 3\n[merge]\ncontext-free = "full"\n'
        f'[privacy]\nsecure-aggregation = {str(secure).lower()}\nmetrics = "sum"\n{roster}'
    )
    costs = []
    bare = tmp_path / "bare"
    bare.mkdir()
    shutil.copy(pico(family) / "config.json", bare)
    for base, options in ((pico(family), ()), (bare, ("--estimate",))):
        (tmp_path / "plan.toml").write_text(text.replace("BASE", str(base)))
        result = CliRunner().invoke(cli, ["plan", "show", str(tmp_path), "--json", *options], catch_exceptions=False)
        assert result.exit_code == 0, result.output
        costs.append(json.loads(result.stdout)["cost"])
    locked, estimated = costs
    for key in ("exchanges", "upload_bytes", "gram_bytes", "delta_bytes", "product_bytes", "coordinator_memory_bytes"):
        assert locked[key] == estimated[key], key


def test_an_estimate_is_for_adapters(tmp_path: Path, pico: Callable[[str], Path]) -> None:
    (tmp_path / "plan.toml").write_text(
        f'[plan]\nname = "x"\n[model]\nbase = "{pico("bert")}"\ntask = "classification"\n{LABELS}\n'
        '[privacy]\nsecure-aggregation = false\n[[silo]]\nname = "a"\n'
    )
    with pytest.raises(PlanError, match="lora"):
        CliRunner().invoke(cli, ["plan", "show", str(tmp_path), "--estimate"], catch_exceptions=False)


def test_a_plan_with_adapters_is_shown_by_kinds_of_layers(show: Callable[..., tuple[str, dict[str, Any]]]) -> None:
    text, preview = show(
        "bert",
        f'task = "classification"\nmax-length = 16\n{LABELS}\n[training]\nfreeze = []\n[training.lora]\nrank = 3',
    )
    assert "adapters rank 3" in text
    assert "bert.encoder.layer.*.output.dense" in text
    assert "base_layer" not in text
    assert {group["d_in"] for group in preview["groups"] if "lora_B" in group["name"]} == {3}
    assert any("lora_A" in name for name in preview["frozen"])
