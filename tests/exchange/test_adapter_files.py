"""Adapters that plain PEFT saved, through `gramfuse measure` and `gramfuse merge`, and back into plain PEFT."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer, PreTrainedModel

from gramfuse_model.adapters.attach import adapters_of
from gramfuse_protocol.errors import ContributionError, GramfuseError, ModelError, PlanError
from gramfuse_server.merging.truncation import truncate
from tests.commands import gramfuse
from tests.conftest import LABELS, messages, write_jsonl

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")  # PEFT's

TARGETS = ["query", "value", "intermediate.dense", "output.dense"]
ALL_TOKENS = ("--tokens", "1000000")


class Bench:
    """A base, adapters of it that plain PEFT saved, and their data."""

    def __init__(self, base: Path, directory: Path) -> None:
        self.base = base
        self.directory = directory

    def model(self, labels: int = len(LABELS)) -> PreTrainedModel:
        with torch.random.fork_rng():
            torch.manual_seed(5)  # all silos start from one head
            return AutoModelForSequenceClassification.from_pretrained(self.base, num_labels=labels).eval()

    def adapter(self, name: str, seed: int, *, rows: int = 40, labels: int = len(LABELS), **config: Any) -> Path:
        """Save an adapter with random matrices; `seed` decides its B, and A unless `shared` is set."""
        shared = config.pop("shared", None)
        torch.manual_seed(seed if shared is None else shared)
        settings = {"r": 3, "lora_alpha": 6, "target_modules": TARGETS, "task_type": TaskType.SEQ_CLS, **config}
        model = get_peft_model(self.model(labels), LoraConfig(**settings))
        torch.manual_seed(seed)
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                if parameter.requires_grad and "lora_A" not in key:
                    spread = 0.3 if "lora_B" in key else 0.01
                    parameter.add_(spread * torch.randn(parameter.shape))
        place = self.directory / name
        model.save_pretrained(place)
        write_jsonl(self.data(name), messages(rows, seed, LABELS[seed % len(LABELS)]))
        return place

    def data(self, name: str) -> Path:
        return self.directory / f"{name}.jsonl"

    def measure(self, name: str, *options: Any, out: str = "") -> Path:
        path = self.directory / f"{out or name}.safetensors"
        given = ("--base", self.base, "--data", self.data(name), "-o", path, "--name", name)
        gramfuse("measure", self.directory / name, *given, "--labels", ",".join(LABELS), *ALL_TOKENS, *options)
        return path

    def merge(self, *files: Path, out: str = "merged", options: tuple[Any, ...] = ()) -> Path:
        gramfuse("merge", *files, "--base", self.base, "-o", self.directory / out, *options)
        return self.directory / out

    def load(self, adapter: Path, labels: int = len(LABELS)) -> PeftModel:
        return PeftModel.from_pretrained(self.model(labels), adapter).eval()


@pytest.fixture
def bench(loud_bert: Path, tmp_path: Path) -> Bench:
    return Bench(loud_bert, tmp_path)


def inputs_of_data(bench: Bench, name: str) -> Iterator[dict[str, torch.Tensor]]:
    tokenizer = AutoTokenizer.from_pretrained(bench.base)
    for line in bench.data(name).read_text(encoding="utf-8").splitlines():
        yield dict(tokenizer([json.loads(line)["text"]], return_tensors="pt"))


def seconds_by_hand(bench: Bench, name: str) -> dict[str, np.ndarray]:
    """The mean of x xᵀ over tokens, by linear module, of an adapter that PEFT runs on its data."""
    model, sums, tokens = bench.load(bench.directory / name), {}, 0

    def hook(module: str) -> Callable[..., None]:
        def add(_: Any, arguments: tuple[torch.Tensor, ...]) -> None:
            x = arguments[0].double().flatten(0, -2)
            sums[module] = sums.get(module, 0) + (x.T @ x).numpy()

        return add

    for module, layer in model.get_base_model().named_modules():
        if isinstance(layer, LoraLayer) or (isinstance(layer, torch.nn.Linear) and ".base_layer" not in module):
            layer.register_forward_pre_hook(hook(module))
    with torch.no_grad():
        for inputs in inputs_of_data(bench, name):
            model(**inputs)
            tokens += inputs["input_ids"].numel()
    return {module: total / tokens for module, total in sums.items()}


def products(bench: Bench, adapter: Path) -> dict[str, np.ndarray]:
    """What an adapter adds to each weight, (d_out, d_in)."""
    layers = adapters_of(bench.load(adapter).get_base_model())
    return {name: layer.get_delta_weight("default").double().detach().numpy() for name, layer in layers}


def test_one_adapter_comes_back_with_equal_outputs(bench: Bench) -> None:
    adapter = bench.adapter("one", 1, use_rslora=True, rank_pattern={"query": 2}, alpha_pattern={"value": 9})
    back = bench.merge(bench.measure("one"))
    first, second = bench.load(adapter), bench.load(back)
    with torch.no_grad():
        for inputs in list(inputs_of_data(bench, "one"))[:5]:
            assert torch.allclose(first(**inputs).logits, second(**inputs).logits, atol=1e-5)


def test_adapters_with_one_a_merge_at_once(bench: Bench) -> None:
    names = ("one", "two")
    for seed, name in enumerate(names):
        bench.adapter(name, seed, shared=9)
    merged = products(bench, bench.merge(*map(bench.measure, names), options=("--alpha", "1")))
    check_against_the_closed_form(bench, names, merged)


def test_adapters_with_different_a_are_exact_in_the_span_of_all_rows(bench: Bench) -> None:
    names = ("one", "two", "three")
    for seed, name in enumerate(names):
        bench.adapter(name, seed, r=2 + seed, target_modules=TARGETS[: 2 + seed])
    first = {name: bench.measure(name) for name in names}
    with pytest.raises(ContributionError, match="--beside"):
        bench.merge(*first.values())
    both = [
        bench.measure(
            name,
            *(item for other in names if other != name for item in ("--beside", first[other])),
            out=f"both-{name}",
        )
        for name in names
    ]
    with pytest.raises(ContributionError, match="--beside"):
        bench.merge(first["one"], both[1])
    with pytest.raises(PlanError, match="first file"):
        bench.measure("one", "--beside", both[1], out="nested")
    merged = bench.merge(*both, options=("--alpha", "1"))
    check_against_the_closed_form(bench, names, products(bench, merged))
    cut = bench.merge(*both, out="cut", options=("--alpha", "1", "--rank", "2"))
    assert json.loads((cut / "adapter_config.json").read_text())["r"] == 2
    lost = json.loads((cut / "report.json").read_text())["truncated"]
    check_what_is_lost(bench, names, products(bench, merged), products(bench, cut), lost)


def check_against_the_closed_form(bench: Bench, names: tuple[str, ...], merged: dict[str, np.ndarray]) -> None:
    """Compare with C = Σ ΔW G Āᵀ (Ā Σ G Āᵀ)⁺ of whole moments, where a layer's inputs are known."""
    added = {name: products(bench, bench.directory / name) for name in names}
    moments = {name: seconds_by_hand(bench, name) for name in names}
    closed = 0
    for module, found in merged.items():
        if ".layer.0.attention.self." in module:  # without context: averaged
            continue
        some = {name: added[name].get(module, np.zeros_like(found)) for name in names}
        rows = np.concatenate([rows_of(bench, name, module) for name in names if module in added[name]])
        basis = np.linalg.svd(rows, full_matrices=False)[2][: np.linalg.matrix_rank(rows)]
        grams = {name: moments[name][module] for name in names}
        closed += 1
        left = sum(some[name] @ grams[name] @ basis.T for name in names)
        expected = left @ np.linalg.inv(basis @ sum(grams.values()) @ basis.T) @ basis
        assert np.abs(found - expected).max() <= 1e-4 * np.abs(expected).max(), module
    assert closed >= 4


def rows_of(bench: Bench, name: str, module: str) -> np.ndarray:
    tensors = load_file(bench.directory / name / "adapter_model.safetensors")
    return tensors[f"base_model.model.{module}.lora_A.weight"].double().numpy()


def check_what_is_lost(
    bench: Bench, names: tuple[str, ...], whole: dict[str, Any], cut: dict[str, Any], lost: dict[str, float]
) -> None:
    moments = [seconds_by_hand(bench, name) for name in names]
    checked = 0
    for module, before in whole.items():
        if ".layer.0.attention.self." in module:
            continue
        second = sum(one[module] for one in moments)
        error = before - cut[module]
        share = np.trace(error @ second @ error.T) / np.trace(before @ second @ before.T)
        assert share == pytest.approx(lost.get(module, 0.0), rel=1e-3, abs=1e-6), module
        checked += 1
    assert checked >= 2


def test_truncation_is_the_best_of_its_rank_in_the_metric_of_the_inputs() -> None:
    rng = np.random.default_rng(0)
    c, rows = rng.normal(size=(7, 6)), rng.normal(size=(6, 9))
    mixing = rng.normal(size=(6, 6)) * np.array([9, 3, 1, 0.3, 0.1, 0.01])
    second = mixing @ mixing.T

    def cost(b: np.ndarray, a: np.ndarray) -> float:
        error = c - b @ a @ np.linalg.pinv(rows)
        return float(np.trace(error @ second @ error.T))

    total = float(np.trace(c @ second @ c.T))
    plain = np.linalg.svd(c @ rows)
    for rank in range(1, 7):
        cut = truncate(c, rows, second, rank)
        assert cut.b.shape == (7, rank)
        assert cut.a.shape == (rank, 9)
        assert cost(cut.b, cut.a) / total == pytest.approx(cut.lost, abs=1e-9)
        assert cost(cut.b, cut.a) <= cost(plain[0][:, :rank] * plain[1][:rank], plain[2][:rank]) + 1e-9
        for _ in range(20):
            moved = cut.b + 0.01 * rng.normal(size=cut.b.shape)
            assert cost(cut.b, cut.a) <= cost(moved, cut.a) + 1e-9
    assert truncate(c, rows, second, 6).lost == pytest.approx(0, abs=1e-12)
    assert truncate(np.zeros((7, 6)), rows, None, 2).lost == 0
    singular = truncate(c, rows, np.diag([1.0, 1, 0, 0, 0, 0]), 2)  # no data in four directions: they cost nothing
    assert singular.lost == pytest.approx(0, abs=1e-12)
    assert np.isfinite(singular.a).all()


def edit(place: Path, **changes: Any) -> None:
    path = place / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def without(place: Path, part: str) -> None:
    path = place / "adapter_model.safetensors"
    save_file({key: value for key, value in load_file(path).items() if part not in key}, path)


@pytest.mark.parametrize(
    ("spoil", "named"),
    [
        (lambda place: edit(place, use_dora=True), "use_dora"),
        (lambda place: edit(place, peft_type="IA3"), "IA3"),
        (lambda place: edit(place, bias="all"), "bias"),
        (lambda place: edit(place, lora_bias=True), "lora_bias"),
        (lambda place: edit(place, init_lora_weights="pissa_niter_4"), "pissa"),
        (lambda place: edit(place, of_the_future={"x": 1}), "of_the_future"),
        (lambda place: edit(place, target_parameters=["x"]), "target_parameters"),
        (lambda place: (place / "adapter_config.json").write_text("["), "adapter_config.json"),
        (lambda place: (place / "adapter_model.safetensors").write_bytes(b"x"), "damaged"),
        (lambda place: (place / "adapter_model.safetensors").rename(place / "adapter_model.bin"), "safetensors"),
        (lambda place: without(place, "classifier"), "head"),
        (lambda place: without(place, "layer.1.output.dense.lora_B"), "lora_B"),
    ],
)
def test_what_is_no_such_adapter_is_refused_and_named(bench: Bench, spoil: Any, named: str) -> None:
    spoil(bench.adapter("one", 1))
    with pytest.raises(ModelError, match=named):
        bench.measure("one")
    assert not (bench.directory / "one.safetensors").exists()


def test_an_adapter_of_another_base_is_refused(bench: Bench, pico_gpt2: Path) -> None:
    bench.adapter("one", 1)
    bench.base = pico_gpt2
    with pytest.raises(GramfuseError):
        bench.measure("one")


def test_files_of_adapters_and_models_do_not_mix_and_only_adapters_have_a_rank(bench: Bench) -> None:
    bench.adapter("one", 1)
    file = bench.measure("one")
    torch.manual_seed(3)
    whole = bench.model()
    with torch.no_grad():
        whole.classifier.weight.add_(1)
    whole.save_pretrained(bench.directory / "whole")
    AutoTokenizer.from_pretrained(bench.base).save_pretrained(bench.directory / "whole")
    write_jsonl(bench.data("whole"), messages(20, 3))
    model = bench.measure("whole")
    with pytest.raises(ContributionError, match="adapter"):
        bench.merge(file, model)
    with pytest.raises(PlanError, match="--rank"):
        bench.merge(model, out="ranked", options=("--rank", "2"))
    with pytest.raises(PlanError, match="adapter"):
        bench.measure("one", "--beside", model, out="beside")


def test_an_adapter_of_a_base_with_other_settings_is_refused(bench: Bench) -> None:
    place = bench.adapter("one", 1)
    labels = {"id2label": dict(enumerate(LABELS)), "label2id": {label: n for n, label in enumerate(LABELS)}}
    config = AutoConfig.from_pretrained(bench.base, **labels)
    config.save_pretrained(place)
    bench.measure("one")
    config.hidden_act = "relu"
    config.save_pretrained(place)
    with pytest.raises(ModelError, match="hidden_act"):
        bench.measure("one", out="other")
