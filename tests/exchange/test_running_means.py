"""Models with batch normalisation: what they compute with beside their parameters travels too."""

from __future__ import annotations

import io
import json
import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from click.testing import CliRunner
from PIL import Image
from transformers import LevitConfig, LevitForImageClassification, ResNetConfig, ResNetForImageClassification

from gramfuse_cli.main import cli
from gramfuse_client.data.batches import Encoded, batches
from gramfuse_client.data.examples import load
from gramfuse_client.exchange.local_model import train
from gramfuse_client.measuring.checkpoint import measure, open_checkpoint, task_of_model
from gramfuse_client.state.state import State
from gramfuse_client.training.evaluate import evaluate
from gramfuse_model.buffers import saved_buffers
from gramfuse_model.loading.base_model import load_base
from gramfuse_model.parameters import add_differences
from gramfuse_protocol.contract.layout import delta_block
from gramfuse_protocol.errors import ContributionError, DataError, ModelError
from gramfuse_protocol.held_out.metrics import metrics
from gramfuse_server.merging.accumulator import Accumulator
from gramfuse_server.merging.files import Settings, merge_files
from gramfuse_simulation.all_silos import AllSilos, Bench
from gramfuse_simulation.comparison import Comparison
from gramfuse_simulation.terms import parse_terms
from tests.projects import Simulated, write_project

CPU = torch.device("cpu")
SILOS = ("north", "south", "east")
EXACT = 'privacy.metrics-epsilon="none"'
MODELS = {
    "resnet": lambda: ResNetForImageClassification(
        ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", num_labels=2)
    ),
    "levit": lambda: LevitForImageClassification(  # its head has a normalisation too
        LevitConfig(
            image_size=32,
            hidden_sizes=[16] * 3,
            num_attention_heads=[2] * 3,
            depths=[1] * 3,
            key_dim=[8] * 3,
            num_labels=2,
        )
    ),
}


def picture(label: int, brightness: float, rng: random.Random) -> bytes:
    """A noisy picture of one of two patterns, as PNG."""
    pattern = np.random.default_rng(label).integers(0, 256, (8, 8, 3)).repeat(4, axis=0).repeat(4, axis=1)
    noise = np.random.default_rng(rng.randrange(2**32)).integers(0, 256, (32, 32, 3))
    file = io.BytesIO()
    Image.fromarray((brightness * (0.7 * pattern + 0.3 * noise)).astype(np.uint8)).save(file, "PNG")
    return file.getvalue()


def pretrained(model: Any) -> Any:
    """Have a model's running means be those of pictures, though not of the silos'."""
    for module in model.modules():
        if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
            torch.nn.init.ones_(module.weight)
            module.momentum = 0.5
    model.train()
    with torch.no_grad():
        for _ in range(20):
            model(torch.randn(32, 3, 32, 32))
    return model


def project(directory: Path, family: str) -> Path:
    """A project of three silos, each with pictures of a brightness of its own."""
    base = directory / "base"
    torch.manual_seed(3)
    pretrained(MODELS[family]()).save_pretrained(base)
    transformers.ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(base)
    data: dict[str, tuple[str, list[Any], list[Any]]] = {}
    for number, name in enumerate(SILOS):
        rng = random.Random(number)
        parts = []
        for part, count in (("train", 48), ("held-out", 24)):
            images = [directory / f"{name}-{part}-{n}.png" for n in range(count)]
            for n, image in enumerate(images):
                image.write_bytes(picture(n % 2, 1 - 0.25 * number, rng))
            parts.append([{"image": str(image), "label": "ab"[n % 2]} for n, image in enumerate(images)])
        data[name] = ("", *parts)
    return write_project(
        directory,
        f'[plan]\nname = "pictures"\n[model]\nbase = "{base}"\ntask = "image-classification"\nlabels = ["a", "b"]\n'
        "[training]\nepochs = 16\nlearning-rate = 3e-3\nbatch-size = 8\n"
        "[privacy]\nsecure-aggregation = false\n",
        data,
        "exact-metrics = true\n",
    )


def accuracy(model: Any, base: Any, silo: Any, task: Any) -> float:
    given = batches(Encoded(load(silo, task)[1], base.tokenizer, task), 64, CPU)
    return metrics(task, evaluate(model, given, task, base.tokenizer))["accuracy"]


@pytest.mark.parametrize("family", MODELS)
def test_a_silos_own_model_merged_alone_is_as_good_as_before_and_two_have_the_mean_of_their_running_means(
    tmp_path: Path, family: str
) -> None:
    here = Simulated(project(tmp_path, family), tmp_path)
    plan, layout, silos, task = here.plan, here.layout, here.silos, here.plan.task_of("north")
    tuned, statistics, alone = {}, {}, {}
    for name in ("north", "south"):
        base = load_base(plan, tmp_path)
        statistics[name] = train(silos[name], plan, layout, base, load(silos[name], task)[0])
        tuned[name] = base.model
        alone[name] = accuracy(base.model, base, silos[name], task)
        assert alone[name] == 1.0
    start = load_base(plan, tmp_path)
    before = {name: buffer.clone() for name, buffer in saved_buffers(start.model).items()}
    moved = {tensor.name for tensor in layout.tensors if tensor.buffer}
    assert moved == before.keys()

    accumulator = Accumulator(layout, alpha=0.9)
    accumulator.fold(statistics["north"], "north")
    add_differences(start.model, accumulator.merge().deltas)
    for name, tensor in start.model.state_dict().items():
        assert torch.allclose(tensor, tuned["north"].state_dict()[name], atol=1e-5), name
    assert accuracy(start.model, start, silos["north"], task) == alone["north"]
    for name, buffer in saved_buffers(start.model).items():
        buffer.copy_(before[name])
    assert accuracy(start.model, start, silos["north"], task) < 0.9, "parameters alone are another model"

    for weighting, shares in (("uniform", (0.5, 0.5)), ("examples", (0.25, 0.75))):
        accumulator = Accumulator(layout, alpha=0.9, weighting=weighting)
        for name, share in zip(tuned, shares, strict=True):
            found = statistics[name]
            accumulator.fold(SimpleNamespace(**{**vars(found), "examples": int(100 * share)}, block=found.block), name)
        both = load_base(plan, tmp_path)
        add_differences(both.model, accumulator.merge().deltas)
        north, south = (saved_buffers(model) for model in tuned.values())
        for name, buffer in saved_buffers(both.model).items():
            if name.endswith("num_batches_tracked"):
                assert buffer == north[name] + south[name] - before[name] == 20 + 2 * 16 * 6
                assert buffer.dtype == torch.int64
            else:
                expected = shares[0] * north[name] + shares[1] * south[name]
                assert torch.allclose(buffer, expected, rtol=1e-5, atol=1e-6)
                assert not torch.equal(buffer, before[name])


def test_secure_and_open_runs_write_the_same_running_means_and_silos_measure_the_model_that_is_written(
    tmp_path: Path, in_process_grid: Any
) -> None:
    directory = project(tmp_path, "resnet")
    written: dict[str, Any] = {}
    for mode in ("false", "true"):
        place = tmp_path / mode
        here = Simulated(directory, place, f"privacy.secure-aggregation={mode}", EXACT, identities=mode == "true")
        plan, layout, silos = here.plan, here.layout, here.silos
        report = here.run(in_process_grid, simulated=here.laboratory()).document()
        assert report["unmeasured"] is None, [c for c in report["checks"] if c["verdict"] != "ok"]
        model = transformers.AutoModelForImageClassification.from_pretrained(place / "run" / "model")
        written[mode] = model.state_dict()
        base, task = load_base(plan, directory), plan.task_of("north")
        found = {entry["name"]: entry["metrics"]["accuracy"] for entry in report["models"]}
        scores = [accuracy(model, base, silos[name], task) for name in SILOS]
        assert found["regmean"] == pytest.approx(np.mean(scores))
        for name in SILOS:  # each alone, on all silos' pictures: what the laboratory makes of its contribution
            own = load_base(plan, directory)
            state = State(silos[name].state, plan.digest)
            add_differences(
                own.model, {t.name: state.contribution().block(delta_block(t.name)) for t in layout.tensors}
            )
            scores = [accuracy(own.model, own, silos[other], task) for other in SILOS]
            assert found[name] == pytest.approx(np.mean(scores))
    assert any(name.endswith("running_var") for name in written["true"])
    for name, tensor in written["true"].items():
        assert torch.allclose(tensor, written["false"][name], rtol=1e-5, atol=1e-6), name


def test_what_a_merge_is_compared_with_has_the_mean_of_the_running_means_too(tmp_path: Path) -> None:
    directory = project(tmp_path, "resnet")
    here = Simulated(directory, tmp_path)
    plan, layout, silos, task = here.plan, here.layout, here.silos, here.plan.task_of("north")
    statistics, tuned = {}, {}
    for name in ("north", "south"):
        base = load_base(plan, directory)
        statistics[name] = train(silos[name], plan, layout, base, load(silos[name], task)[0])
        tuned[name] = {name: b.double().numpy() for name, b in saved_buffers(base.model).items()}
    laboratory = AllSilos(plan, layout, directory, silos, statistics)
    measured: list[Any] = []
    measure = laboratory.measure
    laboratory.measure = lambda deltas, *part: measured.append(deltas) or measure(deltas, *part)  # type: ignore[method-assign]
    terms = parse_terms("fisher,ties,task-arithmetic,fedavg:1")
    models = Comparison(laboratory, {}, lambda event: None).models(terms)
    assert len(models) == len(measured) == 4
    before = laboratory.start()
    for deltas in measured:
        for name in tuned["north"]:
            mean = (tuned["north"][name] + tuned["south"][name]) / 2
            np.testing.assert_allclose(before[name] + deltas[name], mean, rtol=1e-5, atol=1e-5, err_msg=name)
    joint = sum(laboratory.measure_joint(threads=1).values())
    assert metrics(task, joint)["accuracy"] == 1.0


def test_models_that_silos_keep_have_their_own_running_means_of_the_head_and_the_merged_ones_of_the_body(
    tmp_path: Path, in_process_grid: Any
) -> None:
    directory = project(tmp_path, "levit")
    here = Simulated(directory, tmp_path, "model.head=own", "privacy.metrics=silo")
    plan, silos = here.plan, here.silos
    report = here.run(in_process_grid, own_heads=here.finish).document()
    (found,) = (entry["silos"] for entry in report["models"] if entry["name"] == "regmean")
    means = {}
    for name in SILOS:
        model = transformers.AutoModelForImageClassification.from_pretrained(tmp_path / "run" / "models" / name)
        means[name] = saved_buffers(model)
        task, base = plan.task_of(name), load_base(plan, directory, silo=name)
        assert accuracy(model, base, silos[name], task) == found[name]["accuracy"]
    for buffer in means["north"]:
        same = torch.equal(means["north"][buffer], means["south"][buffer])
        assert same != (buffer == "classifier.batch_norm.running_mean" or buffer == "classifier.batch_norm.running_var")


def test_files_of_fine_tuned_models_hold_their_running_means(tmp_path: Path) -> None:
    directory = project(tmp_path, "resnet")
    here = Simulated(directory, tmp_path)
    plan, layout, silo, task = here.plan, here.layout, here.silos["north"], here.plan.task_of("north")
    tuned = load_base(plan, directory)
    train(silo, plan, layout, tuned, load(silo, task)[0])
    tuned.model.save_pretrained(tmp_path / "tuned")
    tuned.tokenizer.save_pretrained(tmp_path / "tuned")
    expected = accuracy(tuned.model, tuned, silo, task)

    from gramfuse_model.heads import head_parameters
    from gramfuse_protocol.statistics.file import write_statistics

    model, base = str(tmp_path / "tuned"), plan.model.base
    checkpoint = open_checkpoint(model, base, task_of_model(model, tmp_path), tmp_path)
    examples = load(silo, task)[0]
    statistics = measure(checkpoint, examples, limit=10**6, batch_size=8, device=CPU, progress=lambda *_: None)
    write_statistics(
        tmp_path / "north.safetensors",
        statistics,
        name="north",
        base=checkpoint.base.origin(base),
        task=checkpoint.task,
        layout=checkpoint.layout,
        head=head_parameters(checkpoint.base.model),
    )
    merge_files([tmp_path / "north.safetensors"], tmp_path / "merged", Settings(base=base), tmp_path)
    merged = transformers.AutoModelForImageClassification.from_pretrained(tmp_path / "merged")
    assert accuracy(merged, tuned, silo, task) == expected == 1.0


class Counting(torch.nn.Module):
    """A model with buffers of every kind."""

    def __init__(self, odd: bool = False) -> None:
        super().__init__()
        self.odd = odd
        self.linear = torch.nn.Linear(3, 2)
        self.register_buffer("calls", torch.tensor(0))
        self.register_buffer("constant", torch.tensor([1.5, 2.0]))
        self.register_buffer("seen", torch.zeros(2, dtype=torch.bool))
        self.register_buffer("passing", torch.zeros(2), persistent=False)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        if self.training:
            self.calls += 1
            self.passing += 1
            if self.odd:
                self.seen = torch.ones(2, dtype=torch.bool)
        return self.linear(features)


def test_only_buffers_that_training_changes_travel_and_what_has_no_mean_is_refused_before_a_plan_is_locked() -> None:
    from gramfuse_model.derive_layout import derive_layout

    batch = {"features": torch.randn(17, 3)}
    model = Counting()
    layout = derive_layout(model, batch)
    assert [(t.name, t.merge) for t in layout.tensors if t.buffer] == [("calls", "sum")]
    assert (model.calls, model.passing.tolist()) == (0, [0, 0]), "the base is as it was"
    with pytest.raises(ModelError, match="'seen'"):
        derive_layout(Counting(odd=True), batch)


def test_a_silo_stops_if_training_changes_a_buffer_that_is_not_merged(
    tmp_path: Path,
) -> None:
    directory = project(tmp_path, "resnet")
    here = Simulated(directory, tmp_path, "training.epochs=1")
    plan, layout = here.plan, here.layout
    without = layout.model_copy(update={"tensors": tuple(t for t in layout.tensors if not t.name.endswith("_var"))})
    silo = here.silos["north"]
    with pytest.raises(ContributionError, match="running_var"):
        train(silo, plan, without, load_base(plan, directory), load(silo, plan.task_of("north"))[0])


def test_a_last_batch_of_one_that_cannot_be_normalised_is_refused_before_anything_is_trained(tmp_path: Path) -> None:
    directory = project(tmp_path, "levit")
    here = Simulated(directory, tmp_path, "training.epochs=1", "training.batch-size=47")
    plan, layout = here.plan, here.layout
    silo = here.silos["north"]
    examples, _ = load(silo, plan.task_of("north"))
    base = load_base(plan, directory)
    before = {name: tensor.clone() for name, tensor in base.model.state_dict().items()}
    with pytest.raises(DataError, match=r"north has 48 examples, .* = 47 .*Levit.*batch-size = 46 or 48"):
        train(silo, plan, layout, base, examples)
    assert all(torch.equal(tensor, before[name]) for name, tensor in base.model.state_dict().items())
    alone = plan.training.model_copy(update={"batch_size": 1})
    with pytest.raises(DataError, match=r"48 examples.*batch-size = 2 or 3"):
        train(silo, plan.model_copy(update={"training": alone}), layout, base, examples)
    for size in (46, 48):
        fitting = plan.training.model_copy(update={"batch_size": size})
        train(silo, plan.model_copy(update={"training": fitting}), layout, load_base(plan, directory), examples)

    text = (directory / "plan.toml").read_text()
    (directory / "plan.toml").write_text(text.replace("batch-size = 8", "batch-size = 47"))
    given = ["silo", "check", str(directory / "silos" / "north.toml"), "--plan", str(directory), "--offline", "--json"]
    found = json.loads(CliRunner().invoke(cli, given).stdout)["findings"]
    (batches_of_one,) = (finding for finding in found if finding["subject"] == "batches")
    assert "batch-size = 46 or 48" in batches_of_one["remedy"]


def test_a_model_that_normalises_over_many_places_trains_on_a_last_batch_of_one(tmp_path: Path) -> None:
    directory = project(tmp_path, "resnet")
    here = Simulated(directory, tmp_path, "training.epochs=1", "training.batch-size=47")
    plan, layout = here.plan, here.layout
    silo = here.silos["north"]
    examples, _ = load(silo, plan.task_of("north"))
    assert train(silo, plan, layout, load_base(plan, directory), examples).examples == 48


def test_models_that_are_tried_one_after_the_other_do_not_see_each_others_weights(tmp_path: Path) -> None:
    """LeViT keeps biases of the model that it was until it is in training mode again."""
    here = Simulated(project(tmp_path, "levit"), tmp_path)
    plan, layout = here.plan, here.layout
    silo = here.silos["north"]
    base = load_base(plan, tmp_path)
    bench = Bench(silo, plan, base, {})
    image = torch.randn(2, 3, 32, 32)
    noise = {t.name: np.random.default_rng(0).normal(0, 3, t.shape) for t in layout.tensors if "biases" in t.name}
    with torch.no_grad():
        before = base.model(image).logits
        with bench.model(noise) as model:
            other = model(image).logits
        assert not torch.allclose(before, other, rtol=1e-2)
        after = base.model(image).logits
    add_differences(base.model, noise)
    with torch.no_grad():
        assert torch.allclose(base.model(image).logits, other, rtol=1e-4)
        assert torch.equal(before, after)
        again = load_base(plan, tmp_path)
        add_differences(again.model, noise)
        assert torch.allclose(again.model(image).logits, other, rtol=1e-4)
