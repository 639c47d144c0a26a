"""Tests which transformers architectures can be merged, with tiny models; makes the table in docs/tasks.md.

    python benchmarks/families.py                       print the table
    python benchmarks/families.py bert xlnet            only these architectures
    python benchmarks/families.py --into docs/tasks.md  write the table into the document (four minutes)

For each architecture, it creates a two-layer model with random weights from the configuration, and checks that

* its Gram matrices on the same examples agree to a relative 1e-6 for batches of 1, batches of 16, and padding on the
  side opposite to its tokenizer's, unless the latter is refused;
* merging two statistics files of one fine-tuned model, measured like `gramfuse measure` does, returns that model;
* transformers loads the merged directory, with the outputs of the model.
"""

from __future__ import annotations

import argparse
import io
import random
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import transformers
from PIL import Image
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from torch import nn
from transformers import PreTrainedModel

from accuracy.tables import insert
from architectures import ARCHITECTURES, TOKENS, Architecture
from gramfuse_client.data.batches import Encoded, batches
from gramfuse_client.data.examples import Examples
from gramfuse_client.measuring.checkpoint import measure, open_checkpoint
from gramfuse_client.measuring.gram import collect_grams
from gramfuse_model.derive_layout import plan_layout
from gramfuse_model.heads import head_parameters
from gramfuse_model.loading.auto_classes import FORMS
from gramfuse_model.loading.base_model import Base, load_base
from gramfuse_model.probing.public_text import PUBLIC_TEXT
from gramfuse_protocol.contract.coverage import coverage, families
from gramfuse_protocol.contract.layout import Layout
from gramfuse_protocol.contract.plan import Plan
from gramfuse_protocol.contract.task import Task
from gramfuse_protocol.errors import ModelError
from gramfuse_protocol.statistics.file import write_statistics
from gramfuse_server.merging.files import Settings, merge_files

CPU = torch.device("cpu")
EXAMPLES = 40
LABELS = ("a", "b", "c")
TAGS = ("O", "B-X", "I-X")
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]")
MAX_LENGTH = 24
UNLIMITED = 10**9

SAME = 1e-6
"""Relative tolerance for Gram matrices, weights and outputs."""


class FamilyRow(NamedTuple):
    """Results of one architecture; differences are relative.

    Args:
        closed: share of the trained parameters that are merged in closed form, including context-free layers.
        sizes: difference of Gram matrices between batches of 1 and of 16.
        other: difference of Gram matrices between the padding sides; None if the other side is refused.
        itself: difference of weights between the measured and the merged model.
        outputs: difference of outputs between the measured model and the merged one after loading.
        averaged: linear layers that are averaged because it is unknown which of their input rows are tokens.
    """

    closed: float
    sizes: float
    other: float | None
    itself: float
    outputs: float
    averaged: str


class Failed(Exception):  # noqa: N818  # reads better without Error
    """A check failed: values that must agree differ."""


@dataclass(frozen=True)
class Workplace:
    """A directory for a tiny model of an architecture, with its task and plan."""

    directory: Path
    architecture: Architecture

    @property
    def task(self) -> Task:
        """The model's task."""
        labels = {"classification": LABELS, "image-classification": LABELS, "token-classification": TAGS}
        kind = self.architecture.task
        return Task(task=kind, labels=labels.get(kind, ()), max_length=MAX_LENGTH, target_length=MAX_LENGTH)

    def save(self, name: str, model: PreTrainedModel) -> Path:
        """Write a model with its tokenizer or image processor."""
        place = self.directory / name
        model.save_pretrained(place)
        if self.architecture.task == "image-classification":
            side = self.image_size
            transformers.ViTImageProcessor(size={"height": side, "width": side}).save_pretrained(place)
        else:
            tokenizer(self.architecture.side).save_pretrained(place)
        return place

    @property
    def image_size(self) -> int:
        """Height and width of the images, in pixels."""
        settings = self.architecture.settings
        size = settings.get("vision_config", settings)["image_size"]
        return size if isinstance(size, int) else size[0]

    def plan(self, base: Path) -> Plan:
        """Return a plan that merges as much as possible in closed form, including context-free layers."""
        labels = f"labels = {list(self.task.labels)}" if self.task.labels else ""
        return Plan.parse(
            f"""
            [plan]
            name = "families"
            [model]
            base = "{base}"
            task = "{self.task.task}"
            max-length = {MAX_LENGTH}
            target-length = {MAX_LENGTH}
            {labels}
            [merge]
            context-free = "full"
            [privacy]
            secure-aggregation = false
            [[silo]]
            name = "one"
            """
        )


def make(name: str) -> PreTrainedModel:
    """Return a tiny model with random weights."""
    architecture = ARCHITECTURES[name]
    settings = dict(architecture.settings)
    if architecture.task == "image-classification":
        settings["num_labels"] = len(LABELS)
    else:
        settings["vocab_size"] = len(vocabulary())
    if architecture.task in ("classification", "token-classification"):
        settings["num_labels"] = len(LABELS)
    config = transformers.AutoConfig.for_model(architecture.type or name, **settings)
    config.architectures = [architecture.class_name] if architecture.class_name else None
    auto = getattr(transformers, FORMS[architecture.task].auto)
    model: PreTrainedModel = auto.from_config(config, trust_remote_code=False).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        # The default initial weights are so small that deeper layers receive almost nothing.
        for parameter in trained(model):
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() > 1:
                parameter.copy_(noise / parameter[0].numel() ** 0.5)
            else:
                parameter.add_(0.1 * noise)
        for module in model.modules():
            if isinstance(module, nn.Embedding) and module.padding_idx is not None:
                module.weight[module.padding_idx] = 0  # zero by construction, and never trained
    return model


def trained(model: PreTrainedModel) -> Iterator[nn.Parameter]:
    """Yield the trainable parameters, without fixed ones such as sinusoidal position tables."""
    return (parameter for parameter in model.parameters() if parameter.requires_grad)


def vocabulary() -> dict[str, int]:
    """Return the vocabulary: special tokens, then the words of the public texts."""
    words = sorted({word for text in PUBLIC_TEXT for word, _ in Whitespace().pre_tokenize_str(text)})
    return {token: index for index, token in enumerate((*SPECIAL, *words))}


def tokenizer(side: str) -> transformers.PreTrainedTokenizerFast:
    """Return a tokenizer with that vocabulary that pads on the given side."""
    words = Tokenizer(WordLevel(vocabulary(), unk_token="[UNK]"))
    words.pre_tokenizer = Whitespace()
    ends = [("[CLS]", TOKENS["bos_token_id"]), ("[SEP]", TOKENS["eos_token_id"])]
    words.post_processor = TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=ends)
    roles = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, padding_side=side, bos_token="[CLS]", eos_token="[SEP]", **roles
    )


def examples(place: Workplace) -> Examples:
    """Return random examples of a task: texts of 1 to 18 words, or images of noise."""
    rng, kind = random.Random(1), place.task.task
    words = list(vocabulary())[len(SPECIAL) :]
    texts = [rng.choices(words, k=rng.randint(1, 18)) for _ in range(EXAMPLES)]
    labels: list[Any] = [rng.randrange(3) for _ in range(EXAMPLES)]
    inputs: list[Any] = [" ".join(text) for text in texts]
    match kind:
        case "token-classification":
            inputs, labels = [tuple(text) for text in texts], [[0] * len(text) for text in texts]
        case "sequence-to-sequence":
            labels = [*inputs[1:], inputs[0]]
        case "causal-lm":
            labels = [None] * EXAMPLES
        case "image-classification":
            inputs = [picture(place.image_size, seed) for seed in range(EXAMPLES)]
    return Examples(inputs, None, labels)


def picture(size: int, seed: int) -> bytes:
    """Return a PNG image of noise."""
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size, size, 3), np.uint8)).save(file, "PNG")
    return file.getvalue()


def check_architecture(name: str) -> FamilyRow:
    """Check one architecture and return the results.

    Raises:
        ModelError: if it is refused.
        Failed: if a check fails.
    """
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="gramfuse-") as directory:
        place = Workplace(Path(directory), ARCHITECTURES[name])
        model = make(name)
        home = place.save("base", model)
        plan = place.plan(home)
        base = load_base(plan, place.directory)
        layout = plan_layout(plan, base)
        samples = examples(place)
        one, sixteen = (grams(base, samples, place.task, layout, size) for size in (1, 16))
        itself, outputs = merged_with_itself(place, home, model, samples)
        row = FamilyRow(
            closed=coverage(layout).closed,
            sizes=furthest(one, sixteen),
            other=None
            if place.task.task == "image-classification"
            else on_the_other_side(plan, base, samples, sixteen),
            itself=itself,
            outputs=outputs,
            averaged=families(t.name.removesuffix(".weight") for t in layout.tensors if t.unmatched),
        )
    odd = {
        key: value
        for key, value in row._asdict().items()
        if key in ("sizes", "other", "itself", "outputs") and value is not None and not value <= SAME
    }
    if odd:
        raise Failed(f"{name}: {', '.join(f'{key} differ by {value:.1e}' for key, value in odd.items())}")
    return row


def grams(base: Base, samples: Examples, task: Task, layout: Layout, size: int) -> dict[str, np.ndarray]:
    """Return the Gram matrices of examples by group, measured in batches of the given size."""
    encoded = Encoded(samples, base.tokenizer, task)
    collected = collect_grams(base.model, batches(encoded, size, CPU), layout, limit=UNLIMITED)
    return {group: gram.mean() for group, gram in collected.items()}


def furthest(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> float:
    """Return the largest relative difference of arrays with the same name; relative to `other`."""
    return max(
        (float(np.linalg.norm(one[name] - other[name]) / (np.linalg.norm(other[name]) or 1.0)) for name in other),
        default=0.0,
    )


def on_the_other_side(plan: Plan, base: Base, samples: Examples, expected: dict[str, np.ndarray]) -> float | None:
    """Return the difference of Gram matrices with padding on the other side, or None if that is refused."""
    base.tokenizer.padding_side = "left" if base.tokenizer.padding_side == "right" else "right"
    try:
        layout = plan_layout(plan, base)
    except ModelError:
        return None
    return furthest(grams(base, samples, plan.task_of("one"), layout, 16), expected)


def merged_with_itself(place: Workplace, home: Path, model: PreTrainedModel, samples: Examples) -> tuple[float, float]:
    """Measure a model twice, merge, load, and return the differences of weights and outputs."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in trained(model):
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.add_(0.05 * parameter.std(correction=0) * noise)
        for table in model.modules():  # training keeps the padding row at zero, and Funnel loads it as zero
            if isinstance(table, nn.Embedding) and table.padding_idx is not None:
                table.weight[table.padding_idx] = 0
        for name, buffer in model.named_buffers():
            if name.rpartition(".")[2] in ("running_mean", "running_var"):
                buffer.add_(0.1)
    tuned = place.save("tuned", model)
    files = []
    for size in (4, 16):
        checkpoint = open_checkpoint(str(tuned), str(home), place.task, place.directory)
        statistics = measure(
            checkpoint, samples, limit=UNLIMITED, batch_size=size, device=CPU, progress=lambda done, total: None
        )
        files.append(place.directory / f"{size}.safetensors")
        write_statistics(
            files[-1],
            statistics,
            name=f"in-batches-of-{size}",
            base=checkpoint.base.origin(str(home)),
            task=place.task,
            layout=checkpoint.layout,
            head=head_parameters(checkpoint.base.model),
        )
    merge_files(files, place.directory / "merged", Settings(base=str(home)), place.directory)
    auto = getattr(transformers, FORMS[place.task.task].auto)
    merged, loading = auto.from_pretrained(
        place.directory / "merged", output_loading_info=True, trust_remote_code=False, use_safetensors=True
    )
    if any(loading.values()):
        raise Failed(f"the merged model does not load: {loading}")
    weights, own = (dict(named(one)) for one in (merged, model))
    encoded = Encoded(samples, checkpoint.base.tokenizer, place.task)
    batch = next(iter(batches(encoded, 16, CPU)))
    with torch.no_grad():
        outputs, expected = (outputs_of(one.eval()(**batch)).double().numpy() for one in (merged, model))
    return furthest(weights, own), furthest({"": outputs}, {"": expected})


def outputs_of(result: Any) -> torch.Tensor:
    """Return a model's logits, which PP-LCNet calls its last hidden state."""
    outputs: torch.Tensor = result["logits" if "logits" in result else "last_hidden_state"]
    return outputs


def named(model: PreTrainedModel) -> Iterator[tuple[str, np.ndarray]]:
    """Yield the floating-point tensors of a model that are not all zero, by name."""
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point() and tensor.any():
            yield name, tensor.detach().double().numpy()


def line(name: str) -> tuple[str, bool]:
    """Return an architecture's row of the table, and whether it is refused.

    Raises:
        Failed: if a check fails.
    """
    architecture, model = ARCHITECTURES[name], type(make(name)).__name__
    try:
        row = check_architecture(name)
    except ModelError as error:
        return f"| {name} | `{model}` | {reason(error)} |", True
    picture = architecture.task == "image-classification"
    side = "" if picture else architecture.side
    other = "" if picture else "refused" if row.other is None else "same"
    averaged = f"`{row.averaged}`" if row.averaged != "nothing" else ""
    return f"| {name} | `{model}` | {side} | {row.closed:.0%} | same | {other} | same | same | {averaged} |", False


def reason(error: ModelError) -> str:
    """Return the reason for a refusal, without the model's class."""
    model, _, why = str(error).partition(") ")
    return f"it {why}" if why else model


def table(names: Iterable[str]) -> str:
    """Check architectures and return the table, as Markdown.

    Raises:
        Failed: if a check fails.
    """
    merged: list[str] = []
    refused: list[str] = []
    for name in names:
        print(name, file=sys.stderr, flush=True)
        text, is_refused = line(name)
        (refused if is_refused else merged).append(text)
    heads = [
        "| architecture | model | padding | in closed form | batches of 1 and 16 | other side | merged with itself | "
        "loaded | averaged, since rows cannot be matched |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    if refused:
        refused = ["", "Refused:", "", "| architecture | model | why |", "|---|---|---|", *refused]
    return "\n".join([*heads, *merged, *refused])


def main(arguments: Sequence[str] | None = None) -> None:
    """Check architectures, and print the table or write it into a document."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="ARCHITECTURE", help="default: all")
    parser.add_argument("--into", type=Path, help="Markdown document with markers for the table `families`")
    options = parser.parse_args(arguments)
    unknown = set(options.names) - set(ARCHITECTURES)
    if unknown:
        parser.error(f"unknown architectures: {', '.join(sorted(unknown))}")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    text = table(options.names or ARCHITECTURES)
    if options.into:
        insert(options.into, "families", text)
    else:
        print(text)


if __name__ == "__main__":
    main()
