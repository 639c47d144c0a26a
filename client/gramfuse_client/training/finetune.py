"""Local fine-tuning with the transformers Trainer: AdamW, linear warm-up and decay."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable
from typing import Any

import torch
from torch.nn.modules.batchnorm import _BatchNorm
from transformers import (
    PreTrainedModel,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from transformers.utils import logging

from gramfuse_client.data.batches import Encoded
from gramfuse_client.silo_file import Memory
from gramfuse_model.buffers import as_in_training
from gramfuse_model.heads import is_encoder_decoder
from gramfuse_model.probing.batch import inputs_of
from gramfuse_protocol.contract.plan_sections import Training
from gramfuse_protocol.errors import DataError, PlanError

Progress = Callable[[int, int], None]
"""Called with (steps done, steps in all)."""


def choose_device(name: str) -> torch.device:
    """Return the device that a silo file names; `auto` prefers CUDA, then MPS, then the CPU.

    Raises:
        PlanError: if the named device is not available.
    """
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = next(device for device, is_available in available.items() if is_available)
    elif not available[name]:
        raise PlanError(f"device = {name!r} in the silo file: torch finds no such device; use 'auto' or 'cpu'")
    return torch.device(name)


def finetune(
    model: PreTrainedModel,
    encoded: Encoded,
    training: Training,
    device: torch.device,
    progress: Progress | None = None,
    owner: str = "this silo",
    memory: Memory = Memory(),  # noqa: B008 - frozen
) -> None:
    """Fine-tune `model` in place for the examples' task. Frozen parameters do not change.

    The result depends only on the arguments, the device and the number of CPU threads.

    Args:
        owner: whose examples they are, for errors.
        memory: whether a batch is computed in parts, and activations twice.

    Raises:
        DataError: if an example has nothing to learn, or the model cannot train on a batch of one example.
        PlanError: if parts of a batch do not divide it.
    """
    encoded.check_learnable()
    size = memory.batch or training.batch_size
    if training.batch_size % size:
        raise PlanError(
            f"{owner}: 'memory.batch' = {size} does not divide the plan's training.batch-size = {training.batch_size}"
        )
    check_batches(model, encoded, size, owner)
    steps = -(-len(encoded) // training.batch_size) * training.epochs
    with tempfile.TemporaryDirectory(prefix="gramfuse-") as scratch, torch.random.fork_rng():
        arguments = TrainingArguments(
            output_dir=scratch,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=training.batch_size // size,
            activation_checkpointing=memory.checkpointing,
            activation_checkpointing_kwargs={"use_reentrant": False} if memory.checkpointing else None,
            num_train_epochs=training.epochs,
            learning_rate=training.learning_rate,
            weight_decay=training.weight_decay,
            warmup_steps=round(training.warmup * steps),
            lr_scheduler_type="linear",
            optim="adamw_torch_fused",
            bf16=training.precision == "bfloat16",
            seed=training.seed,
            data_seed=training.seed,
            use_cpu=device.type == "cpu",
            dataloader_pin_memory=device.type == "cuda",
            report_to=[],
            save_strategy="no",
            logging_strategy="no",
            train_sampling_strategy="random" if encoded.rows is None else "group_by_length",
            disable_tqdm=not sys.stderr.isatty(),
        )
        level = logging.get_verbosity()
        logging.set_verbosity_error()
        try:
            trainer = Trainer(
                model=model,
                args=arguments,
                train_dataset=encoded,
                data_collator=encoded.collate,
                compute_loss_func=encoded.kind.loss(encoded.task),
                callbacks=[] if progress is None else [_ProgressCallback(progress)],
            )
            trainer.remove_callback(PrinterCallback)  # it writes to standard output, which is the command's own
            trainer.train()
            # Else the model would go on in autocast, and what is measured would be in the precision of training.
            trainer.accelerator.unwrap_model(model, keep_fp32_wrapper=False)
            if memory.checkpointing:
                model.activation_checkpointing_disable()
        finally:
            logging.set_verbosity(level)
    model.eval()


def check_batches(model: PreTrainedModel, encoded: Encoded, size: int, owner: str) -> None:
    """Check that a model with batch normalisation can train on every batch, if one would have a single example.

    Batch normalisation cannot normalise a single value. A single example is enough if a layer has several values for
    it, as layers for images usually do. So this tries a batch of one example, and then restores the model.

    Args:
        size: examples in a batch.
        owner: whose examples they are, for the error.

    Raises:
        DataError: naming the number of examples, and batch sizes that work.
    """
    count = len(encoded)
    if count % size != 1 % size or not any(isinstance(module, _BatchNorm) for module in model.modules()):
        return
    shortest = min(range(count), key=encoded.lengths().__getitem__)
    batch = encoded.collate([encoded[shortest]])
    inputs = batch if is_encoder_decoder(model) else inputs_of(batch)
    device = next(model.parameters()).device
    with as_in_training(model), torch.random.fork_rng(), torch.no_grad():
        try:
            model(**{key: value.to(device) for key, value in inputs.items()})
        except ValueError as error:  # from torch's batch_norm
            which = f"each batch has one of the {count:,} examples" if size == 1 else "the last batch has one example"
            fitting = [n for n in range(2, size + count + 2) if count % n != 1]
            near = sorted(sorted(fitting, key=lambda n: abs(n - size))[:2])
            remedy = f"use training.batch-size = {' or '.join(map(str, near))}" if near else "it needs at least two"
            raise DataError(
                f"{owner} has {count:,} examples, and with training.batch-size = {size} {which}, which "
                f"{type(model).__name__} cannot be trained on: batch normalisation needs several ({error}); {remedy}"
            ) from None


class _ProgressCallback(TrainerCallback):
    def __init__(self, progress: Progress) -> None:
        self.progress = progress

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.progress(state.global_step, state.max_steps)
