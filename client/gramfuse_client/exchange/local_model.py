"""The silo's work on its data and the model: the part that needs torch.

Flower starts a new process for every message. Only three phases use this module, so the others need not import torch.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from numpy.typing import NDArray

from gramfuse_client.data.alike import alike
from gramfuse_client.data.batches import Encoded, batches
from gramfuse_client.data.examples import Examples
from gramfuse_client.dry_run.of_machine import lacking_memory
from gramfuse_client.measuring.collect import collect_statistics
from gramfuse_client.measuring.head_sums import collect_head_sums
from gramfuse_client.silo_file import Silo
from gramfuse_client.state.state import State
from gramfuse_client.tasks.registry import at_silo
from gramfuse_client.training.evaluate import evaluate, evaluate_for_sum
from gramfuse_client.training.finetune import choose_device, finetune
from gramfuse_model.adapters.attach import check_trained
from gramfuse_model.adapters.half import halve_frozen
from gramfuse_model.buffers import first_difference, saved_buffers
from gramfuse_model.change import check_changes, check_only_head
from gramfuse_model.derive_layout import plan_layout
from gramfuse_model.head_size import check_outputs
from gramfuse_model.loading.base_model import Base, load_base, own_head
from gramfuse_model.parameters import add_differences, set_values, trainable
from gramfuse_model.probing.lengths import check_lengths
from gramfuse_model.probing.suitable import check_suitable
from gramfuse_model.rescaling import fold
from gramfuse_model.saving import save_model
from gramfuse_protocol.contract.layout import Layout, delta_block
from gramfuse_protocol.contract.plan import Plan
from gramfuse_protocol.contract.task import Task
from gramfuse_protocol.contract.whole_model import with_zeros
from gramfuse_protocol.errors import ContributionError, DataError, PlanError, RefusalError
from gramfuse_protocol.files import make_private_directory
from gramfuse_protocol.held_out.metrics import Sums
from gramfuse_protocol.statistics.contribution import Statistics

EVALUATION_BATCH = 64


class Workbench:
    """One silo's data and base model, under one plan."""

    def __init__(self, silo: Silo, plan: Plan) -> None:
        self.silo = silo
        self.plan = plan
        self.task = plan.task_of(silo.name)
        self._loaded: Base | None = None  # the base model, unmodified
        if silo.file.threads:
            torch.set_num_threads(silo.file.threads)

    def check_layout(self, received: Layout) -> Layout:
        """Return the plan's layout, after checking that it matches this silo's copy of the base model.

        Args:
            received: the layout that came with the plan.

        Raises:
            ModelError: if the base model cannot be loaded, or the base model or the layout is not the plan's.
            PlanError: if the plan's texts are longer than the base model takes.
            RefusalError: if this machine has too little memory to fine-tune or measure.
        """
        base = of_task = self._base()
        if self.plan.task:  # all silos derive the layout from the same task's model
            base = load_base(self.plan, self.silo.project, override=self.silo.base)
        check_lengths(of_task, [self.task], trains=True)
        layout = plan_layout(self.plan, base, received)
        check_suitable(of_task, self.task)
        device = choose_device(self.silo.file.device).type
        lack = lacking_memory(self.plan, self.task, layout, of_task, device, self.silo.file.memory)
        if lack is not None:
            raise RefusalError(f"{self.silo.path}: {lack}", reason="this silo has too little memory for the plan")
        return layout

    def check_model(self, layout: Layout, arrays: Mapping[str, NDArray[Any]], state: State) -> None:
        """Check that a model can be what the session ends with.

        No tensor changes by more than the plan's `merge.maximum-change`, compared with the base, or for a fitted head
        with the one that silos trained from. A head that was just fitted has outputs of a usual size, and nothing but
        the head differs from the model whose features it was fitted to.

        Args:
            arrays: differences from the base (`delta:<parameter>`, float32).
            state: of the session; it has the model that training started from.

        Raises:
            RefusalError: naming the tensor. It does not depend on the silo's data.
        """
        stage = self.plan.stage(state.round)
        self._loaded = self._base()
        start = state.start()
        begun = with_zeros(layout, start) if start else None
        if stage.fits_head:
            check_only_head(layout, arrays, begun)
        compared = None if stage.fits_head else begun
        check_changes(self._loaded.model, layout, arrays, self.plan.merge.maximum_change, compared)
        if stage.fits_head:
            check_outputs(self._loaded, _by_parameter(layout, arrays))

    def measure(
        self, layout: Layout, examples: Examples, state: State, start: Mapping[str, NDArray[Any]]
    ) -> Statistics:
        """Fine-tune on the silo's examples and measure.

        Args:
            start: the model that a later session starts from, as differences from the base (`delta:<parameter>`,
                float32); empty in the first.
        """
        base = self._base()
        if start:
            add_differences(base.model, _by_parameter(layout, start))
        return train(self.silo, self.plan, layout, base, examples, state)

    def measure_head(
        self, layout: Layout, examples: Examples, state: State, start: Mapping[str, NDArray[Any]]
    ) -> Statistics:
        """Sum the moments of the features of the silo's examples, from which a head is fitted.

        Examples of labels with fewer than `limits.minimum-label-examples` are left out
        (`gramfuse_client.tasks.registry.TaskAtSilo.common`).

        Args:
            start: the model whose features count, as differences from the base (`delta:<parameter>`, float32); empty
                for the base.

        Raises:
            DataError: if all examples are left out.
        """
        base, head = self._base(), layout.head
        assert head is not None  # noqa: S101  # the stage has its form
        if start:
            add_differences(base.model, _by_parameter(layout, start))
        device = choose_device(self.silo.file.device)
        least = self.silo.file.limits.minimum_label_examples
        keys = alike(examples, self.task, base.tokenizer)
        kept = examples.take(at_silo(self.task).common(examples, self.task, least, keys))
        if not kept:
            raise DataError(
                f"{self.silo.path}: no example is left for the sums that a head is fitted from: each has a label of "
                f"which there are fewer than {least} examples ('limits.minimum-label-examples')"
            )
        encoded, model = Encoded(kept, base.tokenizer, self.task).hide_rare(least), base.model.to(device)
        total = -(-len(encoded) // EVALUATION_BATCH)
        sums = collect_head_sums(
            model,
            batches(encoded, EVALUATION_BATCH, device, by_length=True),
            self.task,
            progress=lambda done: state.progress("measure", done, total),
        )
        return Statistics(len(kept), {}, sums.blocks(head))

    def evaluate(
        self,
        layout: Layout,
        arrays: Mapping[str, NDArray[Any]],
        state: State,
        held_out: Examples,
        *,
        keep: bool = False,
    ) -> Sums:
        """Return the held-out sums of a model: the base plus differences.

        For a secure sum, they are the bounded sums of `gramfuse_protocol.held_out.sums`, otherwise the exact sums of
        `gramfuse_protocol.held_out.metrics`.

        Args:
            arrays: differences from the base (`delta:<parameter>`, float32).
            state: has the silo's own head, if it keeps one.
            held_out: examples to evaluate on.
            keep: whether this is the silo's finished model; if so, write it into the state.
        """
        base = self._merged(layout, arrays, state)
        device = choose_device(self.silo.file.device)
        encoded, model = Encoded(held_out, base.tokenizer, self.task), base.model.to(device)
        if self.plan.summed:
            sums = evaluate_for_sum(model, encoded, device, self.task, base.tokenizer)
        else:
            held_out_batches = batches(encoded, EVALUATION_BATCH, device, by_length=True)
            sums = evaluate(model, held_out_batches, self.task, base.tokenizer)
        if keep:
            save_privately(base, self.task, state.model)
        return sums

    def keep(self, layout: Layout, arrays: Mapping[str, NDArray[Any]], state: State) -> None:
        """Write this silo's finished model into its state: the base plus differences, with its own head."""
        save_privately(self._merged(layout, arrays, state), self.task, state.model)

    def finish(self, layout: Layout, arrays: Mapping[str, NDArray[Any]], state: State, directory: Path) -> None:
        """Write the base plus differences, with this silo's own head, for `from_pretrained`.

        Args:
            arrays, state: as for `evaluate`.
            directory: made if it does not exist.
        """
        base = self._merged(layout, arrays, state)
        fold(base.model, self.task)
        save_model(base, directory)

    def _merged(self, layout: Layout, arrays: Mapping[str, NDArray[Any]], state: State) -> Base:
        base = self._base()
        add_differences(base.model, _by_parameter(layout, arrays))
        if self.plan.model.head == "own":
            set_values(base.model, state.head())
        return base

    def _base(self) -> Base:
        """Return the base model for the caller to modify: the loaded one if it is unmodified, or a new copy."""
        loaded, self._loaded = self._loaded, None
        if loaded is not None:
            return loaded
        base = load_base(self.plan, self.silo.project, silo=self.silo.name, override=self.silo.base)
        if self.silo.file.memory.base == "bfloat16":
            if base.adapters is None:
                raise PlanError(
                    f"{self.silo.path}: 'memory.base' = \"bfloat16\" is for plans with adapters; this plan trains the "
                    "base's own weights"
                )
            halve_frozen(base.model, base.adapters)
        return base


def save_privately(base: Base, task: Task, directory: Path) -> None:
    """Write or replace a model that only its owner can read; it predicts targets on the data's own scale."""
    fold(base.model, task)
    temporary = directory.with_suffix(".partial")
    shutil.rmtree(temporary, ignore_errors=True)
    make_private_directory(temporary)
    save_model(base, temporary)
    for path in temporary.iterdir():
        path.chmod(0o600)
    shutil.rmtree(directory, ignore_errors=True)
    temporary.rename(directory)


def train(
    silo: Silo, plan: Plan, layout: Layout, base: Base, examples: Examples, state: State | None = None
) -> Statistics:
    """Fine-tune a model on a silo's examples, in place, and measure it.

    A silo with its own head (`model.head`) starts from it in the first round, but differences are still computed from
    the common head. A head that is not merged stays in the state from round to round.

    Args:
        base: the model to fine-tune; differences are computed from it.
        state: has the round, and records progress; None means the first round.

    Raises:
        ContributionError: naming the tensor, if training changes a buffer that all silos share and the layout does not
            merge, or if a value is NaN or infinite; or if training changes what is frozen in adapters, or no adapter.
    """
    device = choose_device(silo.file.device)
    merged = {tensor.name for tensor in layout.tensors}
    fixed = {name: b.clone() for name, b in saved_buffers(base.model).items() if name in base.shared - merged}
    encoded = Encoded(examples, base.tokenizer, plan.task_of(silo.name))
    before = trainable(base.model)
    if state is None or state.round == 1:
        if plan.model.head in ("different", "own"):
            set_values(base.model, own_head(plan, silo.project, silo.name, override=silo.base))
    elif plan.model.head == "own":
        set_values(base.model, state.head(before=True))
    finetune(
        base.model,
        encoded,
        plan.training.in_round(1 if state is None else plan.stage(state.round).round),
        device,
        progress=None if state is None else lambda done, total: state.progress("train", done, total),
        owner=silo.name,
        memory=silo.file.memory,
    )
    if base.adapters is not None:
        check_trained(base.model, base.adapters)
    changed = first_difference(fixed, saved_buffers(base.model))
    if changed is not None:
        raise ContributionError(
            f"training changed the buffer {changed!r}, which did not change when the layout was made, so it would not "
            "be merged; choose another base model"
        )
    if plan.model.head == "own" and state is not None:
        state.save_head({name: value for name, value in trainable(base.model).items() if name not in base.shared})
    size = plan.training.batch_size
    return collect_statistics(
        base.model,
        batches(encoded, size, device, seed=plan.training.seed),
        layout,
        base=before,
        examples=len(examples),
        limit=plan.merge.tokens,
        progress=None if state is None else lambda done: state.progress("measure", done, -(-len(encoded) // size)),
    )


def _by_parameter(layout: Layout, arrays: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
    return {tensor.name: arrays[delta_block(tensor.name)] for tensor in layout.tensors}
