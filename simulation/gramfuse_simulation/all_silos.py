"""All silos of a simulated run in one process: their statistics, their data, and models to measure."""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from gramfuse_protocol.contract.layout import Layout, delta_block
from gramfuse_protocol.contract.plan import Plan
from gramfuse_protocol.held_out.metrics import Sums, sums_shape
from gramfuse_protocol.statistics.contribution import Contribution
from gramfuse_protocol.tasks.registry import kind_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from gramfuse_client.data.batches import Encoded
    from gramfuse_client.data.examples import Examples
    from gramfuse_client.silo_file import Silo
    from gramfuse_client.tasks.registry import Variant
    from gramfuse_model.head_features import Pooling
    from gramfuse_model.loading.base_model import Base
    from gramfuse_model.probing.batch import Batch
    from gramfuse_protocol.statistics.head_sums import HeadSums

Split = Literal["held-out", "validation"]
"""Part of a silo's examples: for the report, or for choices."""

Deltas = Mapping[str, NDArray[Any]]
"""Differences from the base by parameter name, in the parameter's own shape."""

Head = Mapping[str, NDArray[np.float32]]
"""Values of the parameters that a silo keeps to itself, by name."""


class Bench:
    """One silo of the laboratory: its task, device, data, and base model.

    Args:
        silo: its file.
        base: the base model of its task; silos can share it, but only one can use it at a time.
        head: the silo's own head; empty if it keeps none.
        names: index of each label by its name in the data; by default the task's names.
    """

    def __init__(self, silo: Silo, plan: Plan, base: Base, head: Head, names: Mapping[str, int] | None = None) -> None:
        from gramfuse_client.training.finetune import choose_device

        self.silo = silo
        self.plan = plan
        self.task = plan.task_of(silo.name)
        self.base = base
        self.head = head
        self.names = names
        self.device = choose_device(silo.file.device)
        self.parts: Mapping[Split, Encoded] = _LazyDict(self._part)

    @cached_property
    def examples(self) -> tuple[Examples, Examples]:
        """Training and held-out examples."""
        from gramfuse_client.data.examples import load

        return load(self.silo, self.task, self.names)

    def _part(self, part: Split) -> Encoded:
        from gramfuse_client.data.examples import load_validation

        if part == "held-out":
            return self.encoded(self.examples[1])
        return self.encoded(load_validation(self.silo, self.task, self.names))

    def encoded(self, examples: Examples) -> Encoded:
        """Return examples encoded for models of the silo's task."""
        from gramfuse_client.data.batches import Encoded

        return Encoded(examples, self.base.tokenizer, self.task)

    @contextmanager
    def model(self, deltas: Deltas, head: Head | None = None) -> Iterator[PreTrainedModel]:
        """Yield base + deltas on the silo's device; the base is restored on exit.

        Args:
            head: values of the parameters that are not merged; by default the silo's own.
        """
        import torch

        from gramfuse_model.parameters import applied
        from gramfuse_server.merging.accumulator import rounded

        if self.silo.file.threads:
            torch.set_num_threads(self.silo.file.threads)
        model = self.base.model.to(self.device)
        with applied(model, rounded(deltas), self.head if head is None else head):
            yield model

    def measure(self, deltas: Deltas, part: Split) -> Sums:
        """Return the sums of base + deltas on a part of the examples."""
        with self.model(deltas) as model:
            return self.evaluate(model, part)

    def evaluate(self, model: PreTrainedModel, part: Split) -> Sums:
        """Return the sums of a model, which must be on the silo's device."""
        from gramfuse_client.training.evaluate import evaluate

        return evaluate(model, self.batches(part), self.task, self.base.tokenizer)

    def batches(self, part: Split) -> Iterator[Batch]:
        """Yield the batches of a part, as in an exchange."""
        from gramfuse_client.data.batches import batches
        from gramfuse_client.exchange.local_model import EVALUATION_BATCH

        return batches(self.parts[part], EVALUATION_BATCH, self.device, by_length=True)

    def measure_together(self, models: Sequence[tuple[Deltas, Head]], annotated: Sequence[tuple[int, ...]]) -> Sums:
        """Return the held-out sums of an ensemble of models.

        Args:
            models: (differences, values of the parameters that are not merged) of each.
            annotated: indices of the labels that each model was trained on.
        """
        from gramfuse_client.training.ensemble import combine
        from gramfuse_client.training.evaluate import count, outputs

        total: Sums = np.zeros(sums_shape(self.task), np.float64)
        for batch in self.batches("held-out"):
            answers = []
            for deltas, head in models:
                with self.model(deltas, head) as model:
                    answers.append(outputs(model.eval(), batch, self.task, self.base.tokenizer))
            total += count(batch, combine(answers, annotated), self.task, self.base.tokenizer)
        return total

    def finetune(
        self, deltas: Deltas, number: int, encoded: Encoded | None = None, threads: int = 0
    ) -> dict[str, NDArray[np.float32]]:
        """Fine-tune base + deltas with the plan's settings.

        Args:
            number: of the round, from 1; each round shuffles differently.
            encoded: examples; by default the silo's own training examples.
            threads: CPU threads; 0 for the silo file's.

        Returns:
            Values of the trained parameters, by name.
        """
        import torch

        from gramfuse_client.training.finetune import finetune
        from gramfuse_model.parameters import trainable

        owner = self.silo.name if encoded is None else "all silos together"
        encoded = encoded or self.encoded(self.examples[0])
        with self.model(deltas, head={}) as model:
            if threads:
                torch.set_num_threads(threads)
            finetune(model, encoded, self.plan.training.in_round(number), self.device, owner=owner)
            return trainable(model)

    def head_sums(self, deltas: Deltas, pooling: Pooling) -> HeadSums:
        """Return the moments of the features of the silo's training examples, for the base with differences added.

        Examples of labels that are rare at the silo are left out, as in an exchange.
        """
        from gramfuse_client.data.alike import alike
        from gramfuse_client.data.batches import batches
        from gramfuse_client.exchange.local_model import EVALUATION_BATCH
        from gramfuse_client.measuring.head_sums import collect_head_sums
        from gramfuse_client.tasks.registry import at_silo

        train, least = self.examples[0], self.silo.file.limits.minimum_label_examples
        keys = alike(train, self.task, self.base.tokenizer)
        encoded = self.encoded(train.take(at_silo(self.task).common(train, self.task, least, keys))).hide_rare(least)
        with self.model(deltas) as model:
            given = batches(encoded, EVALUATION_BATCH, self.device, by_length=True)
            return collect_head_sums(model, given, self.task, pooling=pooling)

    def measure_head(
        self,
        deltas: Deltas,
        weight: NDArray[np.float64],
        bias: NDArray[np.float64],
        pooling: Pooling,
        part: Split = "held-out",
    ) -> Sums:
        """Return the sums of the base with differences added and another last layer, on a part of the examples.

        Args:
            weight: (outputs, features).
            bias: (outputs,).
        """
        import torch

        from gramfuse_client.training.evaluate import count
        from gramfuse_client.training.outputs import Outputs
        from gramfuse_model.head_features import features_of

        total: Sums = np.zeros(sums_shape(self.task), np.float64)
        with self.model(deltas) as model:
            for batch in self.batches(part):
                features = features_of(model, batch, kind_of(self.task).outputs(self.task), pooling).double().cpu()
                logits = features @ torch.from_numpy(weight.T.copy()) + torch.from_numpy(bias)
                total += count(batch, Outputs(logits), self.task, self.base.tokenizer)
        return total

    def fisher(self, deltas: Deltas, variant: Variant, examples: int) -> dict[str, NDArray[np.float32]]:
        """Return the diagonal Fisher information of base + deltas.

        Args:
            examples: most training examples to use; drawn with the plan's seed.
        """
        from gramfuse_client.data.batches import batches
        from gramfuse_client.training.fisher import fisher_diagonal

        train = self.examples[0]
        drawn = random.Random(self.plan.training.seed).sample(range(len(train)), min(examples, len(train)))  # noqa: S311
        encoded = self.encoded(train.take(sorted(drawn)))
        with self.model(deltas) as model:
            diagonal = fisher_diagonal(model, batches(encoded, 1, self.device), self.task, variant)
        return {name: values.numpy() for name, values in diagonal.items()}


class AllSilos:
    """Measures models as the silos would, without messages.

    Args:
        plan: locked.
        directory: where relative paths of the plan start.
        silos: the silo files by name; their data is read here.
        contributions: statistics of each silo in the merge, in roster order.
        heads: each silo's own head, if the plan has silos keep their heads.
        began: the model that silos first trained from, as differences from the base: a fitted head, or nothing.
    """

    def __init__(
        self,
        plan: Plan,
        layout: Layout,
        directory: Path,
        silos: Mapping[str, Silo],
        contributions: Mapping[str, Contribution],
        heads: Mapping[str, Head] | None = None,
        began: Deltas | None = None,
    ) -> None:
        self.plan = plan
        self.layout = layout
        self.directory = directory
        self.silos = silos
        self.contributions = contributions
        self.heads = heads or {}
        self.began = began or {}

    @cached_property
    def benches(self) -> Mapping[str, Bench]:
        """The bench of each silo in the merge, in roster order; silos with the same task share a base model."""
        from gramfuse_model.loading.base_model import load_base

        tasks = {entry.name: entry.task for entry in self.plan.silo}
        bases: dict[str | None, Base] = {}
        benches = {}
        for name in self.contributions:
            if tasks[name] not in bases:
                bases[tasks[name]] = load_base(self.plan, self.directory, silo=name)
            benches[name] = Bench(self.silos[name], self.plan, bases[tasks[name]], self.heads.get(name, {}))
        return benches

    def deltas(self, silo: str) -> Deltas:
        """Return the differences of a silo's own model from the base."""
        contribution = self.contributions[silo]
        return {tensor.name: contribution.block(delta_block(tensor.name)) for tensor in self.layout.tensors}

    def weight(self, silo: str) -> float:
        """Return a silo's weight c."""
        return float(self.contributions[silo].examples) if self.plan.merge.weighting == "examples" else 1.0

    def weights(self, silo: str) -> dict[str, NDArray[np.float64]]:
        """Return a silo's weight for each parameter; 0 for labels that it does not annotate."""
        from gramfuse_model.normal_equations import tensor_weight

        c = self.weight(silo)
        held = [c if holds else 0.0 for holds in self.layout.held(silo)]
        return {tensor.name: tensor_weight(self.layout, tensor, c, held) for tensor in self.layout.tensors}

    def parents(self) -> tuple[list[Deltas], list[dict[str, NDArray[np.float64]]]]:
        """Return the differences of all silos, zero where their weight is zero, and their weights."""
        weights = [self.weights(name) for name in self.contributions]
        differences: list[Deltas] = [
            {name: np.where(weight[name] > 0, delta, 0) for name, delta in self.deltas(silo).items()}
            for silo, weight in zip(self.contributions, weights, strict=True)
        ]
        return differences, weights

    def start(self) -> dict[str, NDArray[np.float32]]:
        """Return the base model's merged parameters and buffers, by name."""
        from gramfuse_model.parameters import trainable

        base = next(iter(self.benches.values())).base
        start = trainable(base.model)
        return {tensor.name: start[tensor.name] for tensor in self.layout.tensors}

    def measure(self, deltas: Deltas, part: Split = "held-out") -> dict[str, Sums]:
        """Return the sums of base + deltas on each silo's examples, by silo.

        Args:
            deltas: differences from the base by parameter name, in the parameter's shape, of any float dtype.
            part: of the examples; the parts are disjoint.
        """
        return {name: bench.measure(deltas, part) for name, bench in self.benches.items()}

    def measure_ensemble(self) -> dict[str, Sums]:
        """Return the held-out sums of the ensemble of all silos' models, by silo; all silos must have the same task."""
        models = [(self.deltas(name), bench.head) for name, bench in self.benches.items()]
        annotated = [bench.task.annotated for bench in self.benches.values()]
        return {name: bench.measure_together(models, annotated) for name, bench in self.benches.items()}

    def head_sums(self, deltas: Deltas, pooling: Pooling) -> HeadSums:
        """Return the moments of the features of all silos' training examples together."""
        first, *others = (bench.head_sums(deltas, pooling) for bench in self.benches.values())
        return sum(others, first)

    def measure_joint(self, *, cold: bool = False, threads: int | None = None) -> dict[str, Sums]:
        """Return the held-out sums of a model fine-tuned on all silos' data, by silo, which must share one task.

        It starts from the model that silos started from.

        Args:
            cold: start from the base, whatever silos started from.
            threads: CPU threads; by default all, as no other silo trains at the same time.
        """
        from gramfuse_client.data.batches import pooled

        benches = list(self.benches.values())
        everything = pooled([bench.encoded(bench.examples[0]) for bench in benches])
        tuned = benches[0].finetune({} if cold else self.began, 1, everything, threads=threads or os.cpu_count() or 1)
        sums = {}
        for name, bench in self.benches.items():
            with bench.model({}, head=tuned) as model:
                sums[name] = bench.evaluate(model, "held-out")
        return sums


class _LazyDict(dict[Any, Any]):
    """A dict that makes missing values with a function of the key."""

    def __init__(self, make: Callable[[Any], Any]) -> None:
        super().__init__()
        self._make = make

    def __missing__(self, key: Any) -> Any:
        self[key] = self._make(key)
        return self[key]
